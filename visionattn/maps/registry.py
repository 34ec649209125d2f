"""How to explain a layer: one small function for each layer class; and how blocks cut their map into windows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .result import Explanation, Segment


@dataclass
class Product:
    """An attention product that was seen while a module ran.

    Either fused attention with its arguments (queries, keys, mask, scale, causal), or weights that came out of a
    softmax; and the values. All in the model's dtype.
    """

    values: torch.Tensor
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scale: float | None = None
    causal: bool = False
    weights: torch.Tensor | None = None


@dataclass
class Placement:
    """Where the tokens of windows lie in the image.

    Args:
        index: (windows, n) int64; values below H * W are places of the grid, row by row, others padding.
        grid: (H, W).
    """

    index: torch.Tensor
    grid: tuple[int, int]

    @property
    def padding(self) -> int:
        return self.index.numel() - self.grid[0] * self.grid[1]

    @property
    def segments(self) -> tuple[Segment, ...]:
        grid = Segment("grid", self.grid)
        return (grid, Segment("padding", (self.padding,))) if self.padding else (grid,)


@dataclass
class Call:
    """One call of a layer, as its explainer sees it.

    Attributes:
        module: the layer itself, in the model's dtype (the explainer's first argument is a copy in ``dtype``).
        args, kwargs, output: of the call, as they were.
        products: attention products seen while the layer ran.
        placement: where the windows lie, if an enclosing block cuts its map (:func:`register_placement`).
        image: (H, W) of the model's input in pixels, None where it is no image.
        batch: images of the input.
        prefix: class and register tokens, as the model states them.
        dtype: what to compute in.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any
    products: list[Product] = field(default_factory=list)
    placement: Placement | None = None
    image: tuple[int, int] | None = None
    batch: int | None = None
    prefix: int = 0
    dtype: torch.dtype = torch.float32

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument given by position or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def x(self) -> torch.Tensor:
        """The first argument, in ``dtype``."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return first.to(self.dtype)


Explainer = Callable[[nn.Module, Call], Explanation | None]
Placer = Callable[[nn.Module, torch.Tensor], Placement | None]
_explainers: dict[type[nn.Module], Explainer] = {}
_placers: dict[type[nn.Module], Placer] = {}


def register_map(*layers: type[nn.Module]) -> Callable[[Explainer], Explainer]:
    """Decorator of a function (layer, call) -> :class:`Explanation` that explains layers of these classes and of
    classes derived from them. The function may return None: what runs inside of the layer is explained instead."""

    def register(explain: Explainer) -> Explainer:
        for layer in layers:
            _explainers[layer] = explain
        return explain

    return register


def register_placement(*blocks: type[nn.Module]) -> Callable[[Placer], Placer]:
    """Decorator of a function (block, x) -> :class:`Placement` for blocks that hand windows of their input x
    (B, H, W, C) to the attention inside of them; None where they hand over the whole map."""

    def register(place: Placer) -> Placer:
        for block in blocks:
            _placers[block] = place
        return place

    return register


def explainer_of(module: nn.Module) -> Explainer | None:
    return next((_explainers[cls] for cls in type(module).__mro__ if cls in _explainers), None)


def placer_of(module: nn.Module) -> Placer | None:
    return next((_placers[cls] for cls in type(module).__mro__ if cls in _placers), None)


def explained_layers() -> list[str]:
    """Class names with an explainer of their own; every other layer is explained by the softmax that it runs."""
    return sorted(cls.__name__ for cls in _explainers)


def shadow(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in ``dtype``: itself where it is in it, else a copy, in eval mode."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.dtype == dtype for t in tensors if t.is_floating_point()):
        return module
    return copy.deepcopy(module).to(dtype).eval()

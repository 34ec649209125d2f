"""Puts a channel module into the blocks of a CNN that exists already."""

import copy
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .registry import create_module, list_modules, module_class, module_kind, module_preset
from .residual import Residual

PLACES = ("conv", "block", "stage")
_BLOCK_NAMES = re.compile(r"Block|Bottle2?neck|Residual|DepthwiseSeparable|Basic$|XceptionModule")
_SUMS = (operator.add, operator.iadd, torch.add)
_SHORTCUT_NAMES = re.compile(r"downsample|shortcut|skip")


@dataclass(frozen=True)
class Place:
    """One inserted module: after which submodule, on what map, at which cost; ``fitted`` says which groups gave way."""

    path: str
    channels: int
    grid: tuple[int, int]
    params: int
    macs: int
    fitted: str = ""


@dataclass(frozen=True)
class Insertion:
    """What :func:`insert` did; ``print`` it for a table. MACs are those of one image of ``input_size``."""

    name: str
    at: str
    input_size: tuple[int, int, int]
    model: nn.Module = field(repr=False)
    places: tuple[Place, ...]

    @property
    def params(self) -> int:
        """Parameters added."""
        return sum(place.params for place in self.places)

    @property
    def macs(self) -> int:
        """Multiply-accumulates added for one image."""
        return sum(place.macs for place in self.places)

    def __str__(self) -> str:
        width = max(len(place.path) for place in self.places)
        rows = []
        for p in self.places:
            shape = f"{p.channels} x {p.grid[0]} x {p.grid[1]}"
            note = f"  {p.fitted}" if p.fitted else ""
            rows.append(f"  {p.path:<{width}}  {shape:>16}  {p.params:>9,} params  {p.macs:>12,} MACs{note}")
        total = f"{self.name} at {self.at}: {len(self.places)} modules, {self.params:,} params, {self.macs:,} MACs"
        return "\n".join([total, *rows])


class Inserted(nn.Module):
    """``module(host(x))``. State dicts saved before the insertion load into it: their names become the host's."""

    def __init__(self, host: nn.Module, module: nn.Module):
        super().__init__()
        self.host = host
        self.module = module
        self.register_load_state_dict_pre_hook(_host_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.host(x))


class InsertedCall(Inserted):
    """:class:`Inserted` after a host that takes more than a map. A class of its own: TorchScript takes no *args."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(self.host(*args, **kwargs))


def _host_names(module: Inserted, state_dict: dict, prefix: str, *args: Any) -> None:
    # the host's own names may begin with these words too: it may be an Inserted itself
    if any(f"{prefix}host.{name}" in state_dict for name in module.host.state_dict()):
        return
    for name in [n for n in state_dict if n.startswith(prefix)]:
        state_dict[f"{prefix}host.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def insert(
    model: nn.Module,
    name: str,
    at: str | Callable[[str], bool] = "conv",
    residual: bool = False,
    input_size: tuple[int, int, int] | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> Insertion:
    """Inserts the channel module ``name`` into a CNN, in place, and reports where it went and what it costs.

    Args:
        model: a convolutional network of timm (or one written like them); its weights are kept, and state dicts saved
            before the insertion still load into it (with ``strict=False``, for the new modules).
        name: a channel module of :func:`visionattn.list_modules`, built with ``channels=...`` and ``kwargs``.
        at: ``'conv'``: in each block, after the last spatial convolution with its norm and activation (where ELA's
            hosts have it: the unexpanded first block of MobileNetV2 is passed over). Where a block joins several
            convolutions without a norm behind them (Res2Net, DenseNet), that is after the last, on its channels only.
            ``'block'``: after each residual block; ``'stage'``: after the last block of each stage (of each map size,
            where all blocks stand in one list); or a function of a submodule's name that says whether a module
            follows it.
        residual: ``y = module(y) + y`` instead of ``y = module(y)``.
        input_size: (C, H, W) for the map sizes in the report, by default the model's own.
        strict: refuse a network with channels that the module's groups do not divide. By default the groups give way
            there, to their greatest common divisor with the channels, and the report says where (ELA-B in MobileNetV3
            has to: its 16 norm groups do not divide 72 channels).

    Raises:
        ValueError: where nothing would be inserted, a place gives no (B, C, H, W) map, or the module refuses the
            channels of a place. The model is then unchanged.
    """
    if module_kind(name) != "channel":
        raise ValueError(f"{name!r} is not a channel module: use one of {', '.join(list_modules('channel'))}")
    size = _input_size(model) if input_size is None else input_size
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        raise ValueError(f"insert: input_size={input_size!r}: give (channels, height, width) of an image")
    size = tuple(size)
    paths = _find_places(model, at, size)
    if not paths:
        raise ValueError(
            f"insert: nothing in {type(model).__name__} matches at={at!r}: use 'conv', 'block' or 'stage' on a "
            "convolutional network, or a function of submodule names"
        )
    shapes, several = _map_shapes(model, paths, size)
    sample = next(model.parameters(), torch.empty(0))
    built = []
    places = []
    for path in paths:
        channels, *grid = shapes[path][1:]
        groups = {} if strict else module_class(name).fit(**{**module_preset(name), **kwargs, "channels": channels})
        try:
            module = create_module(
                name, channels=channels, device=sample.device, dtype=sample.dtype, **{**kwargs, **groups}
            )
        except ValueError as error:
            raise ValueError(f"insert at {path!r}: {error}") from error
        built.append(module)
        params = sum(p.numel() for p in module.parameters())
        fitted = ", ".join(f"{key}={value}" for key, value in groups.items())
        places.append(Place(path, channels, tuple(grid), params, module.macs(tuple(grid)), fitted))
    # innermost first, so that the names of the others still hold
    for path, module in sorted(zip(paths, built, strict=True), key=lambda pair: -pair[0].count(".")):
        host = model.get_submodule(path)
        wrapper = InsertedCall if path in several else Inserted
        inserted = wrapper(host, Residual(module) if residual else module)
        model.set_submodule(path, inserted)
        inserted.training = host.training
        inserted.module.train(host.training)
    return Insertion(name, at if isinstance(at, str) else "a function", size, model, tuple(places))


def _find_places(model: nn.Module, at: str | Callable[[str], bool], size: tuple[int, ...]) -> list[str]:
    """Names of the submodules that a module follows, in the order of the network."""
    if callable(at):
        return [name for name, _ in model.named_modules() if name and at(name)]
    if at not in PLACES:
        raise ValueError(f"insert: at={at!r} is unknown: use one of {', '.join(PLACES)}, or a function of names")
    blocks = _blocks(model)
    if at == "block":
        return list(blocks)
    if at == "stage":
        last = {path.rpartition(".")[0]: path for path in blocks}  # later blocks of a parent overwrite earlier ones
        if len(last) == 1:
            shapes, _ = _map_shapes(model, list(blocks), size)
            last = {shapes[path][2:]: path for path in blocks}
        return list(last.values())
    expanded = {p: b for p, b in blocks.items() if "DepthwiseSeparable" not in type(b).__name__}
    found = [_after_last_convolution(path, block) for path, block in (expanded or blocks).items()]
    return [path for path in found if path is not None]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that are blocks by the name of their class."""
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in blocks)
        if path and not inside and path.partition(".")[0] != "stem" and _BLOCK_NAMES.search(type(module).__name__):
            blocks[path] = module
    return blocks


def _is_spatial(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


class _BlockTracer(fx.Tracer):
    """Traces a block down to its spatial convolutions; whatever holds none of them is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_spatial(m) or not any(_is_spatial(child) for child in m.modules())


def _after_last_convolution(path: str, block: nn.Module) -> str | None:
    """The submodule that ends the last spatial convolution's norm and activation; None in a block without one."""
    if not any(_is_spatial(m) for m in block.modules()):
        return None
    try:
        graph = _BlockTracer().trace(block)
    except Exception as error:
        raise ValueError(
            f"insert: block {path!r} ({type(block).__name__}) can't be traced: name its places with a function "
            f"instead of at='conv' ({error})"
        ) from error
    modules = dict(block.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    convs = [n for n in calls if _is_spatial(modules[n.target]) and not _SHORTCUT_NAMES.search(n.target)]
    if not convs:
        return None
    node = end = convs[-1]
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is torch.cat:  # one of several branches: the norm of the joined map is the place
            continue
        if convs[-1].args[0].op == "placeholder" and node.target in _SUMS:
            return path  # ... or summed ones (RepVGG): they end with the block
        # a module that the block calls elsewhere too (a shared activation) can't be wrapped
        if node.op != "call_module" or sum(n.target == node.target for n in calls) > 1:
            break
        if _is_norm_or_activation(modules[node.target]):
            end = node
        elif not isinstance(modules[node.target], nn.Identity):
            break
    return f"{path}.{end.target}"


def _is_norm_or_activation(module: nn.Module) -> bool:
    if any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules()):
        return False  # a whole ConvNormAct
    activation = type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    return activation or "Norm" in type(module).__name__


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    return (getattr(model, "in_chans", channels), height, width)


def _map_shapes(model: nn.Module, paths: list[str], size: tuple[int, ...]) -> tuple[dict[str, torch.Size], set[str]]:
    """Output shapes of the named submodules, from a forward pass of a copy that holds no data; and which of them are
    called with more than a map."""
    twin = copy.deepcopy(model).to("meta").eval()
    for module in twin.modules():  # what a user hooked on must not see this pass
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    shapes: dict[str, torch.Size] = {}
    several: set[str] = set()
    for path in paths:

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            if path in shapes:
                raise ValueError(f"insert: {path!r} is called more than once in a forward pass: choose another place")
            if not isinstance(output, torch.Tensor) or not _is_map(output.shape, size):
                raise ValueError(f"insert: {path!r} gives no (B, C, H, W) map: choose another place")
            shapes[path] = output.shape
            if len(args) + len(kwargs) > 1:
                several.add(path)

        twin.get_submodule(path).register_forward_hook(record, with_kwargs=True)
    sample = next(model.parameters(), torch.empty(0))
    with torch.no_grad():
        twin(torch.empty(1, *size, device="meta", dtype=sample.dtype))
    missed = [path for path in paths if path not in shapes]
    if missed:
        raise ValueError(f"insert: {missed[0]!r} is not part of the forward pass: choose another place")
    return shapes, several


def _is_map(shape: torch.Size, size: tuple[int, ...]) -> bool:
    """Whether this is (B, C, H, W) for an image of ``size``, and not (B, H, W, C): H and W shrink alike."""
    if len(shape) != 4:
        return False
    height, width = size[1:]
    return abs(shape[2] / height - shape[3] / width) <= 4 / height + 4 / width

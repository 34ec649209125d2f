"""The arguments of one call, checked: what every backend receives."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .patterns import Disk, Grid, Neighborhood, Pattern, check_grid

# The largest table of relative offsets that the fast backends take, per axis.
LARGEST_BIAS_WINDOW = 13


@dataclass(frozen=True)
class Call:
    """Arguments of :func:`visionattn.ops.local.local_attention`, complete and consistent."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: Grid
    pattern: Pattern
    text: int
    text_first: bool
    text_lengths: torch.Tensor | None
    extra_k: torch.Tensor | None
    extra_v: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def first(self) -> int:
        """Where the grid begins in the joint sequence."""
        return self.text if self.text_first else 0

    @property
    def extra(self) -> int:
        return 0 if self.extra_k is None else self.extra_k.shape[1]

    @property
    def grouped(self) -> bool:
        """Whether query heads share keys; a constant in graphs whose sizes are symbolic."""
        return True if self.q.shape[2] != self.k.shape[2] else False  # noqa: SIM210  (bool() stays symbolic there)

    def settings(self) -> tuple:
        """The arguments in the order of the functions that run them."""
        return (
            self.q, self.k, self.v, self.grid, self.pattern, self.text, self.text_first, self.text_lengths,
            self.extra_k, self.extra_v, self.bias, self.scale,
        )  # fmt: skip

    def grad_settings(self) -> tuple:
        """What the kernels take besides tensors."""
        return self.grid, self.pattern, self.text, self.text_first, self.scale

    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.extra_k, self.extra_v, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pool_tokens(x: torch.Tensor, grid: Grid, factor: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """CLEAR's pooled keys or values: sums over factor x ... blocks of the grid (arXiv 2412.16112, section 3.3).

    Args:
        x: (B, N, H, D), the grid's tokens.
        weight: one number for each place of a block, (factor,) * axes; their mean by default. Not normalised.

    Returns:
        (B, N / factor ** axes, H, D).
    """
    axes = len(grid)
    if any(n % factor for n in grid):
        raise ValueError(f"downsample={factor} does not divide the grid {tuple(grid)}")
    blocks = x.reshape(x.shape[0], *(m for n in grid for m in (n // factor, factor)), *x.shape[2:])
    inner = tuple(range(2, 2 * axes + 1, 2))
    if weight is None:
        pooled = blocks.mean(inner)
    else:
        shape = [1] * blocks.dim()
        for axis in inner:
            shape[axis] = factor
        pooled = (blocks * weight.reshape(shape).to(x.dtype)).sum(inner)
    return pooled.flatten(1, axes)


def make_call(
    q,
    k,
    v,
    grid,
    pattern,
    text=0,
    text_first=True,
    text_lengths=None,
    extra_k=None,
    extra_v=None,
    bias=None,
    scale=None,
) -> Call:
    """Checks the arguments of a call; one line for what is wrong."""
    _check_kinds(q=q, k=k, v=v)
    _check_kinds(text_lengths=text_lengths, extra_k=extra_k, extra_v=extra_v, bias=bias)
    _check_tensors(q, k, v)
    if isinstance(grid, (np.ndarray, torch.Tensor)):
        grid = grid.tolist()
    check_grid(grid)
    grid = tuple(int(n) for n in grid)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern is a {type(pattern).__name__}: give a Neighborhood, Disk, Cross or other Pattern")
    pattern.check(grid)
    n = math.prod(grid)
    if text is None or isinstance(text, (str, float)):
        raise ValueError(f"text={text}: give the number of text tokens, a whole number from 0 on")
    if text < 0 or text + n != q.shape[1]:
        raise ValueError(
            f"grid {grid} has {n} tokens, with text={text} that makes {text + n}, but q, k, v have {q.shape[1]}"
        )
    if text_lengths is not None and (text_lengths.dim() != 1 or text_lengths.shape[0] != q.shape[0]):
        raise ValueError(f"text_lengths has shape {list(text_lengths.shape)}: give one length for each of {q.shape[0]}")
    if text_lengths is not None and text_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"text_lengths is {text_lengths.dtype}: give int32 or int64")
    if isinstance(pattern, Disk) and pattern.downsample and extra_k is None and extra_v is None:
        first = text if text_first else 0
        extra_k, extra_v = (pool_tokens(t[:, first : first + n], grid, pattern.downsample) for t in (k, v))
    _check_extra(k, v, extra_k, extra_v)
    if bias is not None:
        _check_bias(q, grid, pattern, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else _factor(scale)
    return Call(q, k, v, grid, pattern, text, text_first, text_lengths, extra_k, extra_v, bias, scale)


def _factor(scale) -> float:
    try:
        factor = float(scale)
    except (TypeError, ValueError):
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(f"scale={scale}: give a finite number, or None for channels ** -0.5")
    return factor


def _check_kinds(**tensors) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) and (x is not None or name in ("q", "k", "v")):
            raise ValueError(f"{name} is a {type(x).__name__}: give a tensor")


def _check_tensors(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}: give (batch, tokens, heads, channels)")
    if q.shape[3] == 0:
        raise ValueError(f"q has shape {list(q.shape)}: heads need at least one channel")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: give one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: use one device")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k has shape {list(k.shape)}: it must agree with q {list(q.shape)} but for the heads")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}: it must be k's {list(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, k and v {k.shape[2]}: theirs must divide q's")


def _check_extra(k, v, extra_k, extra_v) -> None:
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v go together: give both or neither")
    if extra_k is None:
        return
    expected = (k.shape[0], extra_k.shape[1] if extra_k.dim() == 4 else -1, *k.shape[2:])
    for name, x in (("extra_k", extra_k), ("extra_v", extra_v)):
        if tuple(x.shape) != expected or x.dtype != k.dtype or x.device != k.device:
            raise ValueError(
                f"{name} is {list(x.shape)}, {x.dtype} on {x.device}: k {list(k.shape)}, {k.dtype} on {k.device} "
                "needs (batch, any, heads, channels) of its own kind, the same for both"
            )


def _check_bias(q, grid, pattern, bias) -> None:
    if not isinstance(pattern, Neighborhood):
        raise ValueError(f"bias is a table of a window's offsets: {type(pattern).__name__} has none, use Neighborhood")
    windows = tuple(axis.window for axis in pattern.axes(grid))
    asked = pattern.window if isinstance(pattern.window, tuple) else (pattern.window,) * len(grid)
    if windows != asked:
        raise ValueError(f"window {asked} exceeds the grid {grid}: a bias table needs a grid of at least the window")
    expected = (q.shape[2], *(2 * w - 1 for w in windows))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias has shape {list(bias.shape)}: window {windows} and {q.shape[2]} heads need {expected}")
    if not bias.dtype.is_floating_point or bias.device != q.device:
        raise ValueError(f"bias is {bias.dtype} on {bias.device}: give a floating-point table on {q.device}")


def pad_last(x: torch.Tensor, channels: int) -> torch.Tensor:
    """x with zeros up to `channels` channels."""
    return F.pad(x, (0, channels - x.shape[-1])) if x.shape[-1] < channels else x

"""Which tokens of a grid a token sees: small frozen descriptions, and their exact masks and counts.

A pattern knows nothing of text, tensors or GPUs. :meth:`Pattern.mask` is its definition; everything else (counts, the
tiles that a kernel visits, FlexAttention's mask) is tested against that. A new pattern is one subclass: with
:meth:`Pattern.visible` alone it runs on the reference, ``sdpa`` and ``flex`` backends.

Grids are tuples of 1 to 3 lengths, tokens in row-major order.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

Grid = tuple[int, ...]


def _per_axis(name: str, value, ndim: int, kind: type = int) -> tuple:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * ndim
    if len(values) != ndim:
        raise ValueError(f"{name}={value} has {len(values)} entries: give one number, or one for each of {ndim} axes")
    if kind is int and not all(is_whole(x) for x in values):
        raise ValueError(f"{name}={value}: give whole numbers")
    if kind is bool and not all(x in (0, 1) for x in values):
        raise ValueError(f"{name}={value}: give True or False")
    return tuple(kind(x) for x in values)


def _frozen(value):
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    return tuple(value) if isinstance(value, (tuple, list)) else value


def is_whole(value) -> bool:
    """Whether ``int(value)`` loses nothing: 3, 3.0, a tensor of 3; not 3.5, "3" or None."""
    try:
        return bool(int(value) == value)
    except (TypeError, ValueError, OverflowError):
        return False


def check_grid(grid: Grid) -> None:
    if not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3 or not all(is_whole(n) and n >= 1 for n in grid):
        shown = tuple(grid) if isinstance(grid, list) else grid
        raise ValueError(f"grid={shown}: give 1 to 3 positive lengths, as (64, 64)")


@dataclass(frozen=True)
class Axis:
    """One axis of a neighbourhood: NATTEN's window, per axis (GNA, arXiv 2504.16922, section 3).

    Tokens whose indices agree modulo ``dilation`` form a group; positions and bounds below count inside a group.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def group_length(self, group: int = 0) -> int:
        """Tokens of a dilation group."""
        return self.length // self.dilation + (group < self.length % self.dilation)

    def start(self, i, n: int):
        """First key that query `i` of a group of `n` tokens sees; `i` a number or an array."""
        w, s = self.window, self.stride
        if self.causal:
            leader = np.minimum(i // s * s + s - 1, n - 1)
            return np.maximum(leader - w + 1, 0)
        leader = np.minimum(i // s * s + s // 2, n - 1)
        return np.clip(leader - w // 2, 0, n - w)

    def end(self, i, n: int):
        """One past the last key that query `i` sees."""
        return i + 1 if self.causal else self.start(i, n) + self.window

    def first_after(self, j, n: int):
        """The first query whose :meth:`start` exceeds key `j` (`n` if none does): starts never decrease."""
        w, s = self.window, self.stride
        lead, reach = (s - 1, w) if self.causal else (s // 2, w // 2 + 1)
        leader = j + reach  # what the query's leader must reach
        first = np.minimum(np.maximum(-((lead - leader) // s), 0) * s, n)
        never = leader > n - 1 if self.causal else (leader > n - 1) | (j >= n - w)
        return np.where(j < 0, 0, np.where(never, n, first))

    def queries(self, j, n: int):
        """The interval of queries that see key `j`."""
        first = j if self.causal else self.first_after(j - self.window, n)
        return first, self.first_after(j, n)

    @property
    def dense(self) -> bool:
        return not self.causal and self.window == self.length

    def mask(self) -> np.ndarray:
        """(length, length) boolean: [query, key]."""
        index = np.arange(self.length)
        group, position = index % self.dilation, index // self.dilation
        n = np.where(
            group < self.length % self.dilation, self.length // self.dilation + 1, self.length // self.dilation
        )
        start, end = self.start(position, n), self.end(position, n)
        key = position[None, :]
        return (group[:, None] == group[None, :]) & (key >= start[:, None]) & (key < end[:, None])

    def pairs(self) -> int:
        return int(self.mask().sum()) if self.causal else self.length * self.window


class Pattern:
    """Base of all patterns."""

    def check(self, grid: Grid) -> None:
        """Raises a ValueError where the pattern doesn't exist on this grid."""
        check_grid(grid)

    def visible(self, grid: Grid, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Boolean, broadcast over `queries` and `keys`, flat token indices: whether the query sees the key."""
        raise NotImplementedError(f"{type(self).__name__} does not say which keys are visible")

    def mask(self, grid: Grid, start: int = 0, stop: int | None = None, device=None) -> torch.Tensor:
        """Boolean (stop - start, N): rows of queries `start` to `stop` over all N tokens. This is the definition."""
        self.check(grid)
        n = math.prod(grid)
        queries = torch.arange(start, n if stop is None else stop, device=device)
        return self.visible(grid, queries[:, None], torch.arange(n, device=device)[None, :])

    def pairs(self, grid: Grid) -> int:
        """Exact number of visible (query, key) pairs, pooled keys included."""
        n = math.prod(grid)
        step = max(1, 2**24 // n)
        return sum(int(self.mask(grid, i, min(i + step, n)).sum()) for i in range(0, n, step))

    def dense(self, grid: Grid) -> bool:
        """Whether every token sees every token."""
        return False


def coordinates(index: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
    """Per axis, the coordinates of flat token indices."""
    out = []
    for n in reversed(grid):
        out.append(index % n)
        index = index // n
    return out[::-1]


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """Windows with NATTEN's semantics, in 1, 2 or 3 dimensions (arXiv 2504.16922; sections 3.1 to 3.3).

    Args:
        window: keys along an axis. At a border the window shifts inward: a query always sees ``window`` keys.
            A window that exceeds an undilated axis covers all of it.
        stride: queries ``i // stride`` share the window of their leader. 1 slides, ``window`` is blocked attention.
        dilation: a token sees tokens whose index agrees with its own modulo this; ``window * dilation`` must fit.
        causal: keys after the query are hidden.

    Each is one number for all axes, or one for each.
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "causal"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def axes(self, grid: Grid) -> tuple[Axis, ...]:
        check_grid(grid)
        return _axes(self, tuple(grid))

    def check(self, grid: Grid) -> None:
        self.axes(grid)

    def visible(self, grid, queries, keys):
        out = None
        for axis, q, k in zip(self.axes(grid), coordinates(queries, grid), coordinates(keys, grid), strict=True):
            # one axis is a small table, so the definition is looked up instead of written twice
            table = torch.from_numpy(axis.mask()).to(q.device)
            seen = table[q, k]
            out = seen if out is None else out & seen
        return out

    def pairs(self, grid: Grid) -> int:
        return math.prod(axis.pairs() for axis in self.axes(grid))

    def dense(self, grid: Grid) -> bool:
        return all(axis.dense for axis in self.axes(grid))


@functools.lru_cache(maxsize=1024)
def _axes(pattern: Neighborhood, grid: Grid) -> tuple[Axis, ...]:
    check_grid(grid)
    d = len(grid)
    windows, strides = _per_axis("window", pattern.window, d), _per_axis("stride", pattern.stride, d)
    dilations, causal = _per_axis("dilation", pattern.dilation, d), _per_axis("causal", pattern.causal, d, bool)
    axes = []
    for n, w, s, step, c in zip(grid, windows, strides, dilations, causal, strict=True):
        if w < 1 or s < 1 or step < 1:
            raise ValueError(f"window={w}, stride={s}, dilation={step}: each must be at least 1")
        if w * step > n and step > 1:
            raise ValueError(
                f"window {w} x dilation {step} = {w * step} exceeds the axis of length {n} (grid {grid}): "
                f"use a dilation of at most {n // w}, or pad the map"
            )
        if s > w:
            raise ValueError(f"stride={s} exceeds window={w}: use a stride of at most the window")
        w = min(w, n)
        axes.append(Axis(n, w, min(s, w), step, c))
    return tuple(axes)


@dataclass(frozen=True)
class Disk(Pattern):
    """CLEAR's disk (arXiv 2412.16112): keys at a Euclidean distance below ``radius``, cut at the borders.

    Args:
        radius: in tokens; a key is visible if the squared distance is less than ``radius ** 2``.
        downsample: edge f of the f x f blocks whose pooled keys every grid query sees as well. The operator takes the
            pooled keys as ``extra_k, extra_v`` and averages blocks itself where they are not given.
    """

    radius: int | float
    downsample: int | None = None

    def check(self, grid: Grid) -> None:
        check_grid(grid)
        if not isinstance(self.radius, (int, float, np.number)) or not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius}: give a positive radius, one number")
        f = self.downsample
        if f is not None and (not isinstance(f, (int, np.integer)) or f < 1 or any(n % f for n in grid)):
            raise ValueError(f"downsample={f} does not divide the grid {tuple(grid)}: give one whole number that does")

    def visible(self, grid, queries, keys):
        pairs = zip(coordinates(queries, grid), coordinates(keys, grid), strict=True)
        return sum((q - k) ** 2 for q, k in pairs) < self.radius**2

    def pairs(self, grid: Grid) -> int:
        self.check(grid)
        # tokens at offset d along an axis of length n: n - |d| pairs
        counts = [np.maximum(n - np.abs(np.arange(-n + 1, n)), 0).astype(object) for n in grid]
        squares = [np.arange(-n + 1, n).astype(np.int64) ** 2 for n in grid]
        total = np.zeros((1,), np.int64), np.ones((1,), object)
        for square, count in zip(squares[:-1], counts[:-1], strict=True):
            distance = (total[0][:, None] + square[None, :]).ravel()
            weight = (total[1][:, None] * count[None, :]).ravel()
            keep = distance < self.radius**2
            total = distance[keep], weight[keep]
        n = grid[-1]
        half = np.arange(n).astype(np.int64)
        # keys within +-h of a query along the last axis, summed over its queries
        within = np.concatenate([[0], np.cumsum(np.where(half == 0, n, 2 * (n - half)))])
        reach = np.searchsorted(half**2, self.radius**2 - total[0], side="left")
        pooled = math.prod(grid) ** 2 // self.downsample ** len(grid) if self.downsample else 0
        return int(sum(int(w) * int(within[r]) for w, r in zip(total[1], reach, strict=True))) + pooled

    def dense(self, grid: Grid) -> bool:
        return sum((n - 1) ** 2 for n in grid) < self.radius**2


@dataclass(frozen=True)
class Cross(Pattern):
    """A band of rows and a band of columns (criss-cross groups, GRAT, arXiv 2505.14687) of a 2-D grid.

    A query sees the ``rows`` rows around it, whole, and the ``cols`` columns around it. Bands are windows of
    :class:`Neighborhood`: they shift inward at borders, and queries of a ``stride`` share one.
    """

    rows: int
    cols: int
    stride: int | tuple[int, int] = 1

    def __post_init__(self):
        object.__setattr__(self, "stride", _frozen(self.stride))

    def axes(self, grid: Grid) -> tuple[Axis, Axis]:
        check_grid(grid)
        if len(grid) != 2:
            raise ValueError(f"Cross needs a grid of two axes, got {tuple(grid)}")
        return Neighborhood((self.rows, self.cols), self.stride).axes(grid)

    def check(self, grid: Grid) -> None:
        self.axes(grid)

    def visible(self, grid, queries, keys):
        (qy, qx), (ky, kx) = coordinates(queries, grid), coordinates(keys, grid)
        rows, cols = (torch.from_numpy(axis.mask()).to(queries.device) for axis in self.axes(grid))
        return rows[qy, ky] | cols[qx, kx]

    def pairs(self, grid: Grid) -> int:
        rows, cols = self.axes(grid)
        h, w = grid
        return h * w * (rows.window * w + cols.window * h - rows.window * cols.window)

    def dense(self, grid: Grid) -> bool:
        return any(axis.dense for axis in self.axes(grid))


def radius_squared(pattern: Disk) -> int:
    """The integer that squared distances of visible pairs stay below."""
    return math.ceil(pattern.radius**2)


def encode(pattern: Pattern, ndim: int) -> list[int] | None:
    """A pattern as integers, for an operator's schema; None for patterns that the kernels do not know."""
    if isinstance(pattern, Neighborhood):
        fields = (pattern.window, pattern.stride, pattern.dilation, pattern.causal)
        return [0, *(int(x) for f in fields for x in (f if isinstance(f, tuple) else (f,) * ndim))]
    if isinstance(pattern, Disk):
        return [1, radius_squared(pattern)]
    if isinstance(pattern, Cross):
        stride = pattern.stride if isinstance(pattern.stride, tuple) else (pattern.stride,) * 2
        return [2, pattern.rows, pattern.cols, *stride]
    return None


def decode(code: list[int] | tuple[int, ...]) -> Pattern:
    """The pattern of :func:`encode`."""
    if code[0] == 0:
        d = (len(code) - 1) // 4
        window, stride, dilation, causal = (tuple(code[1 + i * d : 1 + (i + 1) * d]) for i in range(4))
        return Neighborhood(window, stride, dilation, tuple(bool(c) for c in causal))
    if code[0] == 1:
        return Disk(math.sqrt(code[1] - 0.5))  # any radius between the roots of code - 1 and code sees the same
    return Cross(code[1], code[2], (code[3], code[4]))

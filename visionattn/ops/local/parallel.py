"""Local attention whose grid is spread over processes by bands of rows: exact halo exchange, text rows merged.

Each process holds consecutive tokens of the grid. It fetches the rows that its queries reach, from as many neighbours
as they lie on, and attends to them as to a grid of its own: shift, stride and dilation of a window agree if the buffer
begins at a multiple of stride x dilation. Text sees everything: each process attends to its own tokens, and the
partial rows are joined by their log-sum-exps (CLEAR, arXiv 2412.16112, averages them over GPUs instead: another
result).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .api import local_attention
from .attend import attend
from .call import _check_extra, _check_tensors
from .exchange import depend, exchange, gather, shares, world
from .merge import merge
from .patterns import Disk, Grid, Neighborhood, Pattern, check_grid, coordinates, radius_squared
from .planner import replace_pooling


@dataclass(frozen=True)
class Split:
    """Who holds what.

    Args:
        grid: the whole grid.
        tokens: tokens of the grid at each rank, consecutive in row-major order; a rank may have none.
        text: text tokens at each rank, or None if all hold all of them.
    """

    grid: Grid
    tokens: tuple[int, ...]
    text: tuple[int, ...] | None = None

    @property
    def row(self) -> int:
        """Tokens of a row of the first axis."""
        return math.prod(self.grid[1:])

    def bounds(self, rank: int) -> tuple[int, int]:
        """First token of a rank, and the first behind its last."""
        start = sum(self.tokens[:rank])
        return start, start + self.tokens[rank]


@dataclass(frozen=True)
class Halo:
    """Rows of the first axis: those that are fetched [low, high), in a buffer [start, stop) around them."""

    low: int
    high: int
    start: int
    stop: int


def split_rows(grid: Grid, size: int, bands: Any = None) -> tuple[int, ...]:
    """Tokens of each of ``size`` processes, from rows of the first axis: ``bands``, or as equal as they can be.

    Raises:
        ValueError: for bands that are not ``size`` positive numbers that make up the first axis.
    """
    grid = tuple(int(n) for n in grid)
    check_grid(grid)
    if bands is None:
        if grid[0] < size:
            raise ValueError(f"grid {grid} has {grid[0]} rows for {size} processes: use fewer, or spread heads instead")
        bands = shares(grid[0], size)
    bands = tuple(int(b) for b in bands) if hasattr(bands, "__iter__") else (bands,)
    if len(bands) != size or min(bands, default=0) < 1 or sum(bands) != grid[0]:
        raise ValueError(f"bands={bands}: give {size} positive numbers of rows, one a process, that make {grid[0]}")
    return tuple(b * math.prod(grid[1:]) for b in bands)


@functools.lru_cache(maxsize=4096)
def halo(pattern: Pattern, grid: Grid, first: int, last: int) -> Halo:
    """What queries in rows ``first`` to ``last`` of the first axis need, in coordinates of the whole grid.

    A :class:`Neighborhood` is computed from its definition, dilation groups and shifts at borders included; other
    patterns than it and :class:`Disk` need all rows.
    """
    L = grid[0]
    if isinstance(pattern, Disk):
        reach = math.isqrt(radius_squared(pattern) - 1)
        low, high = max(first - reach, 0), min(last + reach + 1, L)
        return Halo(low, high, low, high)
    if not isinstance(pattern, Neighborhood):
        return Halo(0, L, 0, L)
    axis = pattern.axes(grid)[0]
    d, low, high = axis.dilation, L, 0
    rows = np.arange(first, last + 1)
    for group in range(d):
        at = rows[rows % d == group] // d
        if len(at):
            n = axis.group_length(group)
            low = min(low, group + d * int(axis.start(at, n).min()))
            high = max(high, group + d * (int(np.max(axis.end(at, n))) - 1) + 1)
    # whole stride groups, so that leaders are where they are in the whole grid, and room for a window
    step = d * axis.stride
    start, stop = low // step * step, min(-(-high // step) * step, L)
    while stop - start < min(axis.window * d, L) and start > 0:
        start -= step
    stop = min(max(stop, start + axis.window * d), L)
    return Halo(low, high, start, stop)


@functools.lru_cache(maxsize=1024)
def _traffic(split: Split, pattern: Pattern, rank: int) -> tuple[list[slice], tuple[int, ...], tuple[int, ...], Halo]:
    """What a rank sends to each (slices of its tokens), how much, how much it gets from each, and its halo."""
    size = len(split.tokens)
    a, b = split.bounds(rank)
    needs = []
    for r in range(size):
        p, q = split.bounds(r)
        if p == q:
            needs.append((0, 0, Halo(0, 0, 0, 0)))
        else:
            h = halo(pattern, split.grid, p // split.row, (q - 1) // split.row)
            needs.append((h.low * split.row, h.high * split.row, h))
    pieces = [slice(max(low, a) - a, max(min(high, b), max(low, a)) - a) for low, high, _ in needs]
    low, high, mine = needs[rank]
    receive = []
    for r in range(size):
        p, q = split.bounds(r)
        receive.append(max(min(high, q) - max(low, p), 0))
    return pieces, tuple(s.stop - s.start for s in pieces), tuple(receive), mine


def exchanged_tokens(grid: Grid, pattern: Pattern, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens whose keys and values each process receives from others for one call; for planning."""
    split = Split(tuple(grid), tuple(tokens))
    return tuple(sum(_traffic(split, pattern, r)[2]) - split.tokens[r] for r in range(len(tokens)))


def local_attention_bands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    pattern: Pattern,
    text: int = 0,
    text_first: bool = True,
    text_lengths: torch.Tensor | None = None,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    *,
    bands: tuple[int, ...] | None = None,
    text_sharded: bool = False,
    group: Any = None,
) -> torch.Tensor:
    """:func:`local_attention` over the processes of a group, each of which holds a band of the grid's rows.

    Exact: every process gets the rows that one process alone would compute. Halos may be longer than bands. All
    processes call it with the same settings, each with its own tensors.

    Args:
        q, k, v: this process's tokens (B, n, H, D), as in :func:`local_attention`: its text and its band, in
            the order that ``text_first`` tells.
        grid: the whole grid; its first axis is the one that is spread.
        pattern: :class:`Disk` and :class:`Neighborhood` fetch a halo; others need all rows at every process.
            ``Disk(downsample=f)`` averages blocks over the processes.
        text: text tokens in all.
        text_lengths: (B,), of the whole text, the same at every process.
        extra_k, extra_v: the same at every process.
        bands: rows of the first axis at each process; as equal as they can be by default.
        text_sharded: whether each process holds its part of the text (``torch.tensor_split``'s parts), not all of it.
        group: the process group, the default one if None. Its timeout bounds how long a process waits for a lost one.

    Returns:
        (B, n, H, D), this process's rows; replicated text rows are the same at every process. Differentiable: the
        gradients of replicated arguments (text, extra) are each process's part, to be summed over the group.

    Raises:
        ValueError: for tensors that are not this process's part of the grid, or what :func:`local_attention` refuses.
        RuntimeError: without torch.distributed, or if a process is lost.
    """
    rank, size = world(group)
    grid = tuple(int(n) for n in grid)
    tokens = split_rows(grid, size, bands)
    split = Split(grid, tokens, shares(text, size) if text_sharded else None)
    own = text if split.text is None else split.text[rank]
    if q.dim() == 4 and q.shape[1] != own + tokens[rank]:
        raise ValueError(
            f"process {rank} of {size} holds {own} text tokens and {tokens[rank]} of grid {grid}, q has {q.shape[1]}"
        )
    _check_tensors(q, k, v)
    _check_extra(k, v, extra_k, extra_v)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern is a {type(pattern).__name__}: give a Neighborhood, Disk, Cross or other Pattern")
    pattern.check(grid)
    if isinstance(pattern, Disk) and pattern.downsample and extra_k is None:
        first = own if text_first else 0
        pooled = [x[:, first : first + tokens[rank]] for x in (k, v)]
        extra_k, extra_v = pool_over(torch.stack(pooled), split, pattern.downsample, None, group).unbind(0)
    return attend_split(q, k, v, split, pattern, text_first, text_lengths, extra_k, extra_v, scale, backend, group)


def attend_split(
    q, k, v, split: Split, pattern: Pattern, text_first=True, text_lengths=None, extra_k=None, extra_v=None, scale=None,
    backend="auto", group=None,
) -> torch.Tensor:  # fmt: skip
    """:func:`local_attention_bands` for any :class:`Split`, unchecked."""
    rank, _ = world(group)
    n = split.tokens[rank]
    own = q.shape[1] - n
    at = own if text_first else 0
    image, words = slice(at, at + n), slice(0, own) if text_first else slice(n, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pattern = replace_pooling(pattern)
    text_q, text_k, text_v = (x[:, words] for x in (q, k, v))
    if split.text is not None and any(split.text):
        if q.shape[2] == k.shape[2]:
            both = gather(torch.stack([x.transpose(0, 1) for x in (text_q, text_k, text_v)], 1), split.text, group)
            text_q, text_k, text_v = (x.transpose(0, 1) for x in both.unbind(1))
        else:
            text_q, text_k, text_v = (
                gather(x.transpose(0, 1), split.text, group).transpose(0, 1) for x in (text_q, text_k, text_v)
            )
    out = _image_rows(
        q[:, image], k[:, image], v[:, image], (text_q, text_k, text_v), split, pattern, text_lengths, extra_k, extra_v,
        scale, backend, group,
    )  # fmt: skip
    if not text_q.shape[1]:
        return out
    rows = _text_rows(text_q, text_k, text_v, k[:, image], v[:, image], split, text_lengths, scale, group)
    return torch.cat([rows, out] if text_first else [out, rows], 1)


def _image_rows(q, k, v, words, split, pattern, text_lengths, extra_k, extra_v, scale, backend, group) -> torch.Tensor:
    rank, _ = world(group)
    pieces, send, receive, near = _traffic(split, pattern, rank)
    kv = torch.stack([k, v]).transpose(0, 2)  # tokens, B, 2, heads, D
    kv = exchange(torch.cat([kv[piece] for piece in pieces]), send, receive, group)
    a, b = split.bounds(rank)
    if a == b:
        return depend(q, kv, *words[1:], extra_k, extra_v)
    rows, row = near.stop - near.start, split.row
    before, behind = (near.low - near.start) * row, (near.stop - near.high) * row
    # rows of the buffer that nobody here sees: zeros
    k, v = F.pad(kv, (0, 0, 0, 0, 0, 0, 0, 0, before, behind)).transpose(0, 2).unbind(0)
    at = a - near.start * row
    q = F.pad(q, (0, 0, 0, 0, at, rows * row - at - q.shape[1]))
    grid = (rows, *split.grid[1:])
    text_q, text_k, text_v = words
    text = text_q.shape[1]
    if text and text_lengths is not None:  # padding is known to the operator in its text only
        q, k, v = (torch.cat(pair, 1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        at += text
    elif text:
        extra_k, extra_v = (t if e is None else torch.cat([t, e], 1) for t, e in ((text_k, extra_k), (text_v, extra_v)))
        text = 0
    out = local_attention(
        q, k, v, grid, pattern, text=text, text_lengths=text_lengths if text else None, extra_k=extra_k,
        extra_v=extra_v, scale=scale, backend=backend,
    )  # fmt: skip
    return out[:, at : at + b - a]


def _text_rows(q, text_k, text_v, k, v, split: Split, text_lengths, scale, group) -> torch.Tensor:
    """Rows of text: over own tokens, joined over the processes; those of this process where text is sharded."""
    rank, size = world(group)
    outs, lses = [], []
    if k.shape[1]:
        outs, lses = ([x] for x in attend(q, k, v, scale))
    if rank == 0:  # text keys count once
        out, lse = attend(q, text_k, text_v, scale, text_lengths)
        outs, lses = [*outs, out], [*lses, lse]
    if outs:
        out, lse = merge([o.to(lses[0].dtype) for o in outs], lses)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = depend(torch.zeros_like(q, dtype=wide), q)
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    part = torch.cat([out, lse.transpose(1, 2).unsqueeze(-1)], -1).transpose(0, 1)
    if split.text is None:
        send = receive = (part.shape[0],) * size
        part = part.expand(size, *part.shape).flatten(0, 1)
    else:
        send, receive = split.text, (split.text[rank],) * size
    parts = exchange(part, send, receive, group).unflatten(0, (size, receive[0])).transpose(1, 2)
    joined, _ = merge(list(parts[..., :-1].unbind(0)), list(parts[..., -1].transpose(2, 3).unbind(0)))
    return joined.to(q.dtype)


def pool_over(x: torch.Tensor, split: Split, factor: int, weight: torch.Tensor | None, group: Any = None):
    """CLEAR's pooled keys (:func:`pool_tokens`) of a grid over processes: own tokens (..., n, H, D) to all pooled ones.

    ``weight`` is (factor,) * axes, the mean by default. Blocks may lie on several processes.
    """
    rank, size = world(group)
    grid, d = split.grid, len(split.grid)
    coarse = tuple(n // factor for n in grid)
    a, b = split.bounds(rank)
    place = coordinates(torch.arange(a, b, device=x.device), grid)
    if weight is None:
        weight = x.new_full((factor,) * d, factor**-d)
    scaled = x * weight.to(x.dtype)[tuple(p % factor for p in place)][:, None, None]
    block = torch.zeros_like(place[0])
    for p, n in zip(place, coarse, strict=True):
        block = block * n + p // factor
    # blocks are complete in whole rows of blocks, of which this process has a run
    line = math.prod(coarse[1:])
    bounds = []
    for r in range(size):
        start, stop = split.bounds(r)
        lines = (start // split.row // factor, (stop - 1) // split.row // factor + 1)
        bounds.append(lines if stop > start else (0, 0))
    low, high = bounds[rank]
    own = x.new_zeros((*x.shape[:-3], (high - low) * line, *x.shape[-2:]))
    own = own.index_add(x.dim() - 3, block - low * line, scaled)
    parts = gather(own.movedim(-3, 0), tuple((stop - start) * line for start, stop in bounds), group)
    at = torch.cat([torch.arange(start * line, stop * line, device=x.device) for start, stop in bounds])
    total = parts.new_zeros((math.prod(coarse), *parts.shape[1:])).index_add(0, at, parts)
    return total.movedim(0, -3)

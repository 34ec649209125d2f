"""Exact counts of what tiles execute: the arithmetic of a pattern on a grid, without a GPU."""

import functools
import math

import numpy as np

from .patterns import Axis, Cross, Disk, Grid, Neighborhood, Pattern, radius_squared
from .tables import disk_table, tiles_of_axis

Shape = tuple[int, int, int]


def _axis_visits(axis: Axis, own: int, other: int, placement: str) -> tuple[int, int, int]:
    """Of all owner tiles of an axis: visited tiles, those that are full, and owner tiles."""
    visits = full = tiles = 0
    for group in range(axis.dilation):
        n = axis.group_length(group)
        first = np.arange(0, n, own)
        last = np.minimum(first + own, n) - 1
        lo, hi = axis.start(first, n), axis.end(last, n)
        full_lo, full_hi = axis.start(last, n), axis.end(first, n)
        base = lo if placement == "anchored" else lo // other * other
        count = -(-(hi - base) // other)
        begin = -(-(full_lo - base) // other)
        end = (full_hi - base) // other
        if placement == "aligned":  # the axis ends inside the last tile, whose absent keys need no mask of the pattern
            end = np.where(full_hi >= n, count, end)
        visits += int(count.sum())
        full += int(np.maximum(np.minimum(end, count) - begin, 0).sum())
        tiles += len(first)
    return visits, full, tiles


def _box_visits(axes: tuple[Axis, ...], own, other, placement) -> tuple[int, int]:
    per_axis = [_axis_visits(a, o, k, placement) for a, o, k in zip(axes, own, other, strict=True)]
    return math.prod(x[0] for x in per_axis), math.prod(x[1] for x in per_axis)


def _distances(n: int, own: int, other: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the tiles of an axis that lie within `reach` of each other: how many have each least and largest distance."""
    q0 = np.arange(0, n, own)[:, None]
    # only tiles near each other: all of them would take 50 ms on a grid of 512 x 512
    span = min((own + 2 * reach) // other + 2, -(-n // other))
    k0 = (np.maximum(q0 - reach, 0) // other + np.arange(span)) * other
    q1, k1 = np.minimum(q0 + own, n) - 1, np.minimum(k0 + other, n) - 1
    there = k0 < n
    near = np.maximum(np.maximum(q0 - k1, k0 - q1), 0)[there]
    far = np.maximum(q1 - k0, k1 - q0)[there]
    return np.bincount(near), np.bincount(far)


def _aligned_disk(radius_sq: int, grid: Grid, own, other) -> tuple[int, int]:
    """Visits and full visits of a disk when key tiles lie on the grid's own raster."""
    reach = math.isqrt(radius_sq - 1)
    near, far = zip(*(_distances(n, o, k, reach) for n, o, k in zip(grid, own, other, strict=True)), strict=True)

    def below(many):
        # distances, one an axis, whose squares sum to less than the squared radius
        squares, pairs = np.zeros(1, np.int64), np.ones(1, np.int64)
        for axis in many[:-1]:
            squares = (squares[:, None] + np.arange(len(axis)) ** 2).ravel()
            pairs = (pairs[:, None] * axis).ravel()
        columns = np.searchsorted(np.arange(len(many[-1])) ** 2, radius_sq - squares, side="left")
        return int((pairs * np.concatenate([[0], np.cumsum(many[-1])])[columns]).sum())

    return below(near), below(far)


def _cross_visits(axes: tuple[Axis, ...], own, other) -> tuple[int, int]:
    """As :func:`.tables.cross_table` has them, without the table, which takes 0.4 s on a grid of 256 x 256."""
    counted = []
    for axis, o, k in zip(axes, own, other, strict=True):
        seen, full = tiles_of_axis(axis, o, k, False)
        fits = np.arange(seen.shape[1]) * k + k <= axis.length
        counted.append((seen.size, int(seen.sum()), len(seen) * int(fits.sum()), int((full & fits).sum())))
    (tiles_y, seen_y, fits_y, full_y), (tiles_x, seen_x, fits_x, full_x) = counted
    # of the row band or the column band
    visited = seen_y * tiles_x + tiles_y * seen_x - seen_y * seen_x
    return visited, full_y * fits_x + fits_y * full_x - full_y * full_x


def _table_visits(table: np.ndarray, classes_x: int, tiles_y: int, tiles_x: int) -> tuple[int, int]:
    class_y, class_x = table[:tiles_y], table[tiles_y : tiles_y + tiles_x]
    many_y, many_x = np.bincount(class_y), np.bincount(class_x, minlength=classes_x)
    first = tiles_y + tiles_x
    heads = table[first : first + 3 * len(many_y) * classes_x].reshape(len(many_y), classes_x, 3).astype(np.int64)
    weight = many_y[:, None] * many_x[None, :]
    return int(((heads[..., 2] - heads[..., 0]) * weight).sum()), int(((heads[..., 2] - heads[..., 1]) * weight).sum())


@functools.lru_cache(maxsize=1024)
def visits(pattern: Pattern, grid: Grid, own: Shape, other: Shape, placement: str = "anchored") -> tuple[int, int]:
    """(query tile, key tile) visits of the grid against itself, and how many of them need no mask.

    Args:
        own, other: tiles of queries and keys along z, y, x; a grid of fewer axes uses the last ones.
        placement: ``'anchored'``: key tiles begin where a query tile's window begins, as our kernels place them;
            ``'aligned'``: key tiles lie on the grid's own raster, as kernels do that permute tokens.
    """
    if placement not in ("anchored", "aligned"):
        raise ValueError(f"placement={placement!r}: use 'anchored' or 'aligned'")
    pattern.check(grid)
    own, other = own[3 - len(grid) :], other[3 - len(grid) :]
    if isinstance(pattern, Neighborhood):
        return _box_visits(pattern.axes(grid), own, other, placement)
    if len(grid) == 1:
        grid, own, other = (1, *grid), (1, *own), (1, *other)
    if isinstance(pattern, Disk) and placement == "aligned":
        return _aligned_disk(radius_squared(pattern), grid, own, other)
    if isinstance(pattern, Disk) and len(grid) == 2:
        table, classes = disk_table(radius_squared(pattern), grid, own, other)
    elif isinstance(pattern, Cross):
        return _cross_visits(pattern.axes(grid), own, other)
    else:
        raise ValueError(f"no tiles are known for {type(pattern).__name__} on a grid of {len(grid)} axes")
    return _table_visits(table, classes, -(-grid[0] // own[0]), -(-grid[1] // own[1]))


def count(pattern: Pattern, grid: Grid, text: int, extra: int, query: Shape, key: Shape) -> dict[str, int]:
    """Pairs of a whole layer, text rows included.

    ``pairs``: visible; ``dense``: all; ``executed``: in tiles that are visited; ``masked``: of those, under a mask;
    ``raster``: in visited blocks of 128 tokens in a row; ``text_rows``: of text queries.
    """
    grid = tuple(grid)
    n = math.prod(grid)
    N = n + text
    if isinstance(pattern, Disk) and pattern.downsample:
        extra = 0  # counted among the pattern's pairs
        pooled = n * (n // pattern.downsample ** len(grid))
    else:
        pooled = n * extra
    area = math.prod(query[3 - len(grid) :]) * math.prod(key[3 - len(grid) :])
    # rows of 128 tokens, as FlexAttention's blocks lie on a grid of at least 128 columns
    row = (1, max(1, 128 // grid[-1]), min(grid[-1], 128))
    try:
        visited, full = visits(pattern, grid, query, key)
        raster = visits(pattern, grid, row, row, "aligned")[0] * math.prod(row[3 - len(grid) :]) ** 2
    except ValueError:
        visited, full, raster = n * n // area, 0, n * n
    prefix = n * text + pooled + text * N
    pairs = pattern.pairs(grid) + n * extra + n * text + text * N
    return {
        "pairs": pairs,
        "dense": N * N,
        "text_rows": text * N,
        "executed": visited * area + prefix,
        "masked": (visited - full) * area,
        "raster": raster + prefix,
    }

"""Which tiles a tile visits, for patterns that are not boxes: small integer tables that the kernels read.

A table holds, for a class of owner tiles, the offsets of the tiles they visit: those that need a mask first. Tiles far
from every border share one class, so that a disk's table does not grow with the grid.

Layout (int32): class of each tile row, class of each tile column, (begin, full, end) of each class, offsets (y and x,
16 bits each).
"""

import functools
import math

import numpy as np

from .patterns import Axis, Cross, Disk, Grid, radius_squared

Tile = tuple[int, int]


@functools.lru_cache(maxsize=256)
def disk_stencil(radius_sq: int, own: Tile, other: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (visits, 2) of `other` tiles that cover all tokens within the radius of an `own` tile; which are full.

    Bands of tile rows are placed so that the fewest tiles are needed, and each band's tiles are centred.
    """
    reach = math.isqrt(radius_sq - 1)
    (oh, ow), (th, tw) = own, other
    rows = oh + 2 * reach
    bands = -(-rows // th)
    best = None
    for shift in range(bands * th - rows + 1):
        offsets = []
        for band in range(bands):
            top = -reach - shift + band * th
            widest = -1
            for y in range(max(top, -reach), min(top + th, oh + reach)):
                gap = max(0, -y, y - oh + 1)
                widest = max(widest, math.isqrt(radius_sq - 1 - gap * gap))
            if widest < 0:
                continue
            count = -(-(ow + 2 * widest) // tw)
            left = -((count * tw - ow) // 2)
            offsets += [(top, left + i * tw) for i in range(count)]
        array = np.array(offsets, np.int64)
        far_y = np.maximum(np.abs(array[:, 0] - oh + 1), np.abs(array[:, 0] + th - 1))
        far_x = np.maximum(np.abs(array[:, 1] - ow + 1), np.abs(array[:, 1] + tw - 1))
        full = far_y**2 + far_x**2 < radius_sq
        key = (len(array), -int(full.sum()))
        if best is None or key < best[0]:
            best = key, array, full
    return best[1], best[2]


def _border_classes(length: int, own: int, offsets: np.ndarray, other: int):
    """Class of each owner tile of an axis; per class and offset: whether the tile meets the axis, whether it fits."""
    origin = np.arange(-(-length // own)) * own
    at = origin[:, None] + offsets[None, :]
    state = (at + other > 0) & (at < length), (at >= 0) & (at + other <= length)
    found: dict[bytes, int] = {}  # np.unique over rows takes longer than all the rest
    inverse = np.array([found.setdefault(row.tobytes(), len(found)) for row in np.hstack(state)])
    index = np.unique(inverse, return_index=True)[1]
    return inverse, state[0][index], state[1][index]


def _pack(offsets: np.ndarray) -> np.ndarray:
    return ((offsets[..., 0] << 16) | (offsets[..., 1] & 0xFFFF)).astype(np.int32)


@functools.lru_cache(maxsize=256)
def disk_table(radius_sq: int, grid: Grid, own: Tile, other: Tile) -> tuple[np.ndarray, int]:
    """The table of a disk, and its number of column classes."""
    offsets, full = disk_stencil(radius_sq, own, other)
    class_y, meets_y, fits_y = _border_classes(grid[0], own[0], offsets[:, 0], other[0])
    class_x, meets_x, fits_x = _border_classes(grid[1], own[1], offsets[:, 1], other[1])
    visited = meets_y[:, None] & meets_x[None, :]
    whole = visited & fits_y[:, None] & fits_x[None, :] & full
    rank = np.where(visited, np.where(whole, 1, 0), 2).reshape(-1, len(offsets))
    order = np.argsort(rank, axis=1, kind="stable")
    first = len(class_y) + len(class_x) + 3 * len(rank)
    begin = first + np.arange(len(rank)) * len(offsets)
    heads = np.stack([begin, begin + (rank == 0).sum(1), begin + (rank < 2).sum(1)], 1)
    table = np.concatenate([class_y, class_x, heads.ravel(), _pack(offsets)[order].ravel()])
    return table.astype(np.int32), len(meets_x)


SIDE = 8  # of the squares of queries and keys of the disk's Gluon kernel


@functools.lru_cache(maxsize=64)
def _square_words(radius_sq: int, groups: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Of each tile of :func:`disk_stencil`: a number that says who needs it, and what each query sees of it.

    Numbers hold the tile's index, and in bit 16 + c whether warpgroup c sees any key. Words (tiles, warpgroups, 64)
    of 64 bits; keys and queries are counted row by row.
    """
    offsets, _ = disk_stencil(radius_sq, (SIDE * groups[0], SIDE * groups[1]), (SIDE, SIDE))
    part = SIDE * np.stack(np.divmod(np.arange(groups[0] * groups[1]), groups[1]), 1)
    apart = np.arange(SIDE) - np.arange(SIDE)[:, None]  # (query, key)
    y, x = ((offsets[:, None, None, None, i] + apart - part[None, :, None, None, i]) ** 2 for i in (0, 1))
    seen = y[:, :, :, None, :, None] + x[:, :, None, :, None, :] < radius_sq  # tiles, warpgroups, query y x, key y x
    words = np.packbits(seen.reshape(*seen.shape[:2], SIDE**2, SIDE**2), axis=-1, bitorder="little")
    words = np.ascontiguousarray(words.view(np.int64)[..., 0])
    needs = (words.any(2) << np.arange(16, 16 + len(part))).sum(1)
    return np.arange(len(offsets)) | needs, words


@functools.lru_cache(maxsize=64)
def disk_words(radius_sq: int, grid: Grid, groups: Tile) -> tuple[np.ndarray, int, np.ndarray, int]:
    """For the Gluon kernel, whose tiles are `groups` (y, x) of 8 x 8 queries, and 8 x 8 keys.

    Returns a disk's table, followed by a number for each of its visits; how many visits these are; words, as
    :func:`_square_words` has them; and the table's number of column classes.
    """
    own, other = (SIDE * groups[0], SIDE * groups[1]), (SIDE, SIDE)
    table, classes_x = disk_table(radius_sq, grid, own, other)
    numbers, words = _square_words(radius_sq, groups)
    tiles = sum(-(-n // o) for n, o in zip(grid, own, strict=True))
    entries = len(table) - int(table[tiles])  # the first class begins right behind all heads
    packed = _pack(disk_stencil(radius_sq, own, other)[0])
    order = np.argsort(packed)
    found = order[np.searchsorted(packed, table[-entries:], sorter=order)]
    return np.concatenate([table, numbers[found].astype(np.int32)]), entries, words, classes_x


def tiles_of_axis(axis: Axis, own: int, other: int, keys_own: bool) -> tuple[np.ndarray, np.ndarray]:
    """(own tiles, other tiles): whether any pair, and whether every pair of an existing owner, is visible."""
    mask = axis.mask().T if keys_own else axis.mask()
    n_own, n_other = -(-axis.length // own), -(-axis.length // other)
    seen = np.zeros((n_own * own, n_other * other), bool)
    seen[: axis.length, : axis.length] = mask
    seen = seen.reshape(n_own, own, n_other, other)
    every = seen.copy().reshape(n_own * own, -1)
    every[axis.length :] = True
    return seen.any((1, 3)), every.reshape(seen.shape).all((1, 3))


@functools.lru_cache(maxsize=32)
def cross_table(pattern: Cross, grid: Grid, own: Tile, other: Tile, keys_own: bool) -> tuple[np.ndarray, int]:
    """The table of a cross: every tile is a class of its own, since bands cross the whole grid."""
    axes = pattern.axes(grid)
    (any_y, all_y), (any_x, all_x) = (
        tiles_of_axis(axis, a, b, keys_own) for axis, a, b in zip(axes, own, other, strict=True)
    )
    fits = [np.arange(any_.shape[1]) * b + b <= n for any_, b, n in zip((any_y, any_x), other, grid, strict=True)]
    shape = (any_y.shape[0], any_x.shape[0], any_y.shape[1], any_x.shape[1])
    visited = any_y[:, None, :, None] | any_x[None, :, None, :]
    whole = (all_y[:, None, :, None] | all_x[None, :, None, :]) & fits[0][None, None, :, None] & fits[1]
    parts = [np.nonzero((visited & ~whole).reshape(-1, shape[2] * shape[3])), np.nonzero(whole.reshape(visited.shape)
             .reshape(-1, shape[2] * shape[3]))]  # fmt: skip
    classes = shape[0] * shape[1]
    counts = [np.bincount(owner, minlength=classes) for owner, _ in parts]
    owner = np.concatenate([part[0] for part in parts])
    visit = np.concatenate([part[1] for part in parts])
    order = np.argsort(owner, kind="stable")
    owner, visit = owner[order], visit[order]
    offsets = np.stack([
        visit // shape[3] * other[0] - owner // shape[1] * own[0],
        visit % shape[3] * other[1] - owner % shape[1] * own[1],
    ], 1)  # fmt: skip
    first = shape[0] + shape[1] + 3 * classes
    end = first + np.cumsum(counts[0] + counts[1])
    begin = end - counts[0] - counts[1]
    heads = np.stack([begin, begin + counts[0], end], 1)
    table = np.concatenate([np.arange(shape[0]), np.arange(shape[1]), heads.ravel(), _pack(offsets)])
    return table.astype(np.int32), shape[1]


def table_for(pattern, grid: Grid, own: Tile, other: Tile, keys_own: bool) -> tuple[np.ndarray, int]:
    """The table of a pattern on a 2-D grid: `own` tiles are queries', or keys' for the backward pass."""
    if isinstance(pattern, Disk):
        return disk_table(radius_squared(pattern), grid, own, other)
    return cross_table(pattern, grid, own, other, keys_own)

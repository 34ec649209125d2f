"""Which keys a tile of queries of a disk visits together: tables for the Gluon kernel (kernels_disk.py).

A tile of queries belongs to several warpgroups that own 8 x 8 queries each. Its keys are read in pieces of a few rows
of 8, so that few lie outside the disk, and a step is as many pieces as one product of matrices takes. All tiles of a
grid take the same steps. What a query sees of a step is a word of bits; which of its keys lie on the grid are two more
words, of the tile's row and of its column.
"""

import functools
import itertools

import numpy as np

from .tables import disk_stencil

SIDE = 8  # of a warpgroup's square of queries, and the width of a piece
ABSENT = -(2**15)  # where a piece lies that fills a step up: outside every grid


@functools.lru_cache(maxsize=64)
def disk_steps(radius_sq: int, groups: tuple[int, int], keys: int, height: int):
    """Steps of `keys` keys, in pieces of `height` x 8, for `groups` (y, x) of warpgroups.

    Returns offsets (steps, pieces, 2) of the pieces from the tile's origin; needs (steps,), whose bit c says whether
    warpgroup c sees any of the keys; and words (steps, warpgroups, 64, keys / 64) of 64 bits: what each query sees.
    """
    offsets, _ = disk_stencil(radius_sq, (SIDE * groups[0], SIDE * groups[1]), (height, SIDE))
    part = SIDE * np.array(list(itertools.product(range(groups[0]), range(groups[1]))))
    squares = []
    for axis, length in ((0, height), (1, SIDE)):
        d = offsets[:, None, None, None, axis] + np.arange(length) - np.arange(SIDE)[:, None]
        squares.append((d - part[None, :, None, None, axis]) ** 2)
    # (pieces, warpgroups, queries y, queries x, keys y, keys x)
    seen = squares[0][:, :, :, None, :, None] + squares[1][:, :, None, :, None, :] < radius_sq
    seen = seen.reshape(len(offsets), len(part), SIDE * SIDE, height * SIDE)
    need = (seen.any((2, 3)) << np.arange(len(part))).sum(1)
    pieces = _gather(need, keys // (height * SIDE))
    covers = (offsets <= 0).all(1) & (offsets + np.array([height, SIDE]) > 0).all(1)  # the tile's own first key
    pieces = _arrange(pieces, need, int(np.flatnonzero(covers)[0]))
    absent = pieces < 0
    bits = np.where(absent[..., None, None, None], False, seen[pieces])
    bits = bits.transpose(0, 2, 3, 1, 4).reshape(len(pieces), len(part), SIDE * SIDE, keys)
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.int64)
    where = np.where(absent[..., None], ABSENT, offsets[pieces])
    return where, _needs(pieces, need), np.ascontiguousarray(words)


def _needs(pieces, need):
    return np.bitwise_or.reduce(np.where(pieces >= 0, need[pieces], 0), 1)


def _gather(need, count: int):
    """Indices (steps, count) of pieces, -1 for none: those that the same warpgroups need lie together."""
    kinds = sorted(set(need.tolist()) - {0})
    orders = itertools.permutations(kinds) if len(kinds) <= 5 else [sorted(kinds, key=int.bit_count)]
    best = None
    for order in orders:
        flat = np.concatenate([np.flatnonzero(need == kind) for kind in order])
        flat = np.concatenate([flat, np.full(-len(flat) % count, -1)]).reshape(-1, count)
        cost = sum(int(n).bit_count() for n in _needs(flat, need)), len(flat)
        if best is None or cost < best[0]:
            best = cost, flat
    return best[1]


def _arrange(pieces, need, own: int):
    """Spreads the steps of each set of warpgroups evenly, so that none waits for the others; that of piece `own` first,
    as one that every tile visits."""
    needs = _needs(pieces, need).tolist()
    at = [(needs[:i].count(n) + 0.5) / needs.count(n) for i, n in enumerate(needs)]
    first = (pieces == own).any(1)
    return pieces[np.lexsort((at, ~first))]


@functools.lru_cache(maxsize=64)
def disk_lists(radius_sq: int, grid: tuple[int, int], groups: tuple[int, int], keys: int, height: int):
    """What the kernel reads: (table, edges, words), and the number of steps.

    table (int32): class of each tile row and of each tile column, needs of each step, offsets of its pieces (y and x,
    16 bits each). edges (int64; classes, steps, keys / 64): which keys lie on the grid along y, or along x; classes 0
    and 1 are of rows and columns far from every border.
    """
    where, needs, words = disk_steps(radius_sq, groups, keys, height)
    inner = np.stack(np.divmod(np.arange(height * SIDE), SIDE), -1)
    at = (where[:, :, None] + inner).reshape(len(where), keys, 2)
    there = np.repeat(where[..., 0] != ABSENT, height * SIDE, 1)
    classes, edges = [], [np.full((2, len(where), keys // 64), -1, np.int64)]
    made = 2
    for axis, length in enumerate(grid):
        low, high = int(at[there][:, axis].min()), int(at[there][:, axis].max())
        origins = range(0, length, SIDE * groups[axis])
        found: dict[tuple[int, int], int] = {}
        index = []
        for origin in origins:
            ends = max(low, -origin), min(high, length - 1 - origin)
            if ends not in found and ends != (low, high):
                bits = (at[..., axis] >= ends[0]) & (at[..., axis] <= ends[1])
                edges.append(np.packbits(bits, axis=-1, bitorder="little").view(np.int64)[None])
                found[ends] = made
                made += 1
            index.append(found.get(ends, axis))
        classes.append(index)
    packed = (where[..., 0] << 16) | (where[..., 1] & 0xFFFF)
    table = np.concatenate([*classes, needs, packed.reshape(-1)]).astype(np.int32)
    return table, np.concatenate(edges), words, len(needs)

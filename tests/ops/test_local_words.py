"""The tables of the disk's Gluon kernel say what the pattern's mask says, every pair once."""

import numpy as np
import pytest

from visionattn.ops.local import Disk
from visionattn.ops.local.patterns import radius_squared
from visionattn.ops.local.tables import disk_words

CASES = [
    ((45, 50), 9, (1, 2)),
    ((13, 9), 4, (1, 2)),
    ((40, 48), 16, (1, 2)),
    ((33, 50), 6.5, (2, 1)),
    ((1, 9), 3, (1, 1)),
    ((9, 41), 1, (1, 2)),
]


def border(origin, n):
    """As kernels_disk.inside: which of 8 positions are within the axis."""
    return np.arange(origin, origin + 8) % 2**32 < n


def expand(grid, radius, groups):
    """How often each query (first two axes) visits each key."""
    (H, W), (qy, qx) = grid, groups
    table, entries, words, classes = disk_words(radius_squared(Disk(radius)), grid, groups)
    rows, columns = -(-H // (8 * qy)), -(-W // (8 * qx))
    seen = np.unpackbits(words[..., None].view(np.uint8), axis=-1, bitorder="little").reshape(*words.shape, 64) > 0
    found = np.zeros((rows * qy * 8, columns * qx * 8, H, W), np.int32)
    for ty, tx in np.ndindex(rows, columns):
        head = rows + columns + 3 * (table[ty] * classes + table[rows + tx])
        for i in range(table[head], table[head + 2]):
            number = table[i + entries]
            y, x = ty * 8 * qy + (table[i] >> 16), tx * 8 * qx + int(table[i].astype(np.int16))
            here = (border(y, H)[:, None] & border(x, W)[None, :]).reshape(-1)
            assert here.any()
            for c in range(qy * qx):
                visible = seen[number & 0xFFFF, c]
                assert (number >> (16 + c) & 1) == visible.any()
                query, key = np.nonzero(visible & here)
                at = (ty * qy + c // qx) * 8 + query // 8, (tx * qx + c % qx) * 8 + query % 8
                np.add.at(found, (*at, y + key // 8, x + key % 8), 1)
    return found[:H, :W]


@pytest.mark.parametrize(("grid", "radius", "groups"), CASES)
def test_words_are_the_mask(grid, radius, groups):
    mask = Disk(radius).mask(grid).numpy().reshape(*grid, *grid)
    np.testing.assert_array_equal(expand(grid, radius, groups), mask)

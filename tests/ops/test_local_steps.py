"""The tables of the disk's Gluon kernel say what the pattern's mask says, every pair once."""

import numpy as np
import pytest

from visionattn.ops.local import Disk
from visionattn.ops.local.patterns import radius_squared
from visionattn.ops.local.steps import ABSENT, disk_lists, disk_steps

CASES = [
    ((45, 70), 9, (1, 2), 128, 8),
    ((13, 9), 4, (1, 2), 128, 4),
    ((40, 64), 16, (1, 2), 128, 2),
    ((33, 50), 6.5, (1, 3), 64, 2),
    ((1, 9), 3, (2, 1), 64, 8),
    ((70, 41), 1, (1, 1), 64, 4),
]


def bits(words, keys):
    return np.unpackbits(words[..., None].view(np.uint8), axis=-1, bitorder="little").reshape(*words.shape[:-1], keys)


def expand(grid, radius, groups, keys, height):
    """How often each query (first two axes) visits each key, and how many pairs the steps compute."""
    (H, W), (qy, qx), count = grid, groups, keys // (8 * height)
    table, edges, words, steps = disk_lists(radius_squared(Disk(radius)), grid, groups, keys, height)
    rows, columns = -(-H // (8 * qy)), -(-W // (8 * qx))
    needs = table[rows + columns :][:steps]
    offsets = table[rows + columns + steps :].reshape(steps, count)
    seen, edges = bits(words, keys).astype(bool), bits(edges, keys).astype(bool)
    inner = np.stack(np.divmod(np.arange(height * 8), 8), -1)
    found = np.zeros((rows * qy * 8, columns * qx * 8, H, W), np.int32)
    for tile in np.ndindex(rows, columns):
        row, column = table[tile[0]], table[rows + tile[1]]
        here = edges[row] & edges[column]
        assert here[0].any()  # every tile takes the first step
        assert (row == 0 and column == 1) <= here.all()
        origin = np.array([tile[0] * 8 * qy, tile[1] * 8 * qx])
        for i in range(steps):
            at = origin + (np.stack([offsets[i] >> 16, offsets[i].astype(np.int16)], -1)[:, None] + inner).reshape(
                -1, 2
            )
            for c in range(qy * qx):
                visible = seen[i, c] & here[i]
                assert (needs[i] >> c & 1) or not seen[i, c].any()
                query, key = np.nonzero(visible)
                y, x = origin[0] + c // qx * 8 + query // 8, origin[1] + c % qx * 8 + query % 8
                np.add.at(found, (y, x, at[key, 0], at[key, 1]), 1)
    return found[:H, :W]


@pytest.mark.parametrize(("grid", "radius", "groups", "keys", "height"), CASES)
def test_lists_are_the_mask(grid, radius, groups, keys, height):
    mask = Disk(radius).mask(grid).numpy().reshape(*grid, *grid)
    np.testing.assert_array_equal(expand(grid, radius, groups, keys, height), mask)


def test_steps_are_few():
    """A radius of 16: tiles of 8 x 8 keys need 24 visits; two warpgroups share most steps."""
    for height, most in ((8, 26), (4, 24), (2, 24)):
        where, needs, words = disk_steps(256, (1, 2), 128, height)
        own = [int((needs >> c & 1).sum()) * 2 for c in range(2)]
        assert max(own) <= most
        assert len(needs) * 2 <= 30
        assert len(words) == len(needs) == len(where)
        assert (where != ABSENT).any((1, 2)).all()

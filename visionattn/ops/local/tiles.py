"""Tile sizes of the kernels, by GPU, dtype and head size. docs/kernels.md has the measurements behind them."""

import math
from dataclasses import dataclass

import torch
import triton

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """One kernel's tiles of queries and keys (z, y, x), warps and pipeline stages."""

    query: Shape
    key: Shape
    warps: int
    stages: int

    @property
    def queries(self) -> int:
        return math.prod(self.query)

    @property
    def keys(self) -> int:
        return math.prod(self.key)

    def launch(self) -> dict[str, int]:
        return dict(num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class Tiles:
    """The tiles of every kernel. `tma`: loads through tensor descriptors; `waves`: programs that fill the GPU."""

    forward: Tile
    dense: Tile
    query: Tile
    backward_keys: Tile
    tma: bool
    waves: int = 528


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's takes 3 us, and was half of what the host did in an eager call."""
    return -(-a // b)


def pad_dim(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


# Tiles of as many tokens, for grids of one, two and three axes: near-square, the last axis longest.
SHAPES = {
    1: {16: (1, 1, 16), 32: (1, 1, 32), 64: (1, 1, 64), 128: (1, 1, 128), 256: (1, 1, 256)},
    2: {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16), 256: (1, 16, 16)},
    3: {16: (1, 4, 4), 32: (2, 4, 4), 64: (2, 4, 8), 128: (2, 8, 8), 256: (4, 8, 8)},
}

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


def pick_tiles(dtype: torch.dtype, dim: int, boxes, bias: bool, capability: int, text: int = 512) -> Tiles:
    """`capability`: 90 for 9.0; 0 where kernels are interpreted. `text`: number of text tokens."""
    axes = 3 if boxes.three else 2 if boxes.lengths[1] > 1 else 1
    shape = SHAPES[axes]
    row = pad_dim(dim) * dtype.itemsize  # bytes of a token
    roomy = SHARED_KIB.get(capability, 99) >= 163

    def tile(queries, keys, warps, stages):
        return Tile(shape[queries], shape[keys], warps, stages)

    if bias and axes == 2 and row <= 64:
        # wide tiles of few keys: the addresses of the bias take most registers, and a window's rows fit into 16 columns
        slim = (1, 2, 16)
        forward, query = Tile(shape[64], slim, 4, 2), Tile(shape[64], slim, 4, 1)
        keys, dense = Tile(slim, shape[64], 4, 1), tile(64, 64, 4, 2)
    elif bias or row <= 64:
        forward, query, keys = tile(64, 64, 4, 2), tile(64, 64, 4, 1), tile(64, 64, 4, 1)
        dense = tile(64, 64, 4, 2)
    elif dtype == torch.float32:
        return _float32_tiles(tile, row, roomy)
    elif row <= 256 and roomy:
        large = capability == 90  # as measured; three stages of 128 keys need more memory than an A100 has
        forward = tile(64, 64, 4, 3) if boxes.kind == 1 else tile(128, 128 if large else 64, 8, 3)
        dense = tile(256 if large and text > 128 else 128, 64, 8, 3)
        query, keys = tile(64, 64, 4, 2), tile(64, 64, 4, 2)
    elif row <= 256:
        forward, dense, query, keys = tile(64, 32, 4, 2), tile(64, 32, 4, 2), tile(64, 32, 4, 1), tile(32, 64, 4, 1)
    elif roomy:
        forward, dense, query, keys = tile(64, 64, 8, 2), tile(64, 64, 8, 2), tile(64, 32, 8, 1), tile(32, 64, 8, 1)
    else:
        forward, dense, query, keys = tile(32, 32, 4, 1), tile(32, 32, 4, 1), tile(32, 16, 4, 1), tile(16, 32, 4, 1)
    return Tiles(forward, dense, query, keys, tma=capability in (90, 100, 103) and not bias and row >= 128)


def _float32_tiles(tile, row: int, roomy: bool) -> Tiles:
    if row <= 256:
        return Tiles(tile(64, 32, 4, 1), tile(64, 32, 4, 1), tile(32, 32, 4, 1), tile(32, 32, 4, 1), False)
    if row <= 512 and roomy:
        return Tiles(tile(64, 32, 4, 1), tile(64, 32, 4, 1), tile(32, 32, 4, 1), tile(32, 32, 4, 1), False)
    small = tile(16, 16, 4, 1)
    return Tiles(small, small, small, small, False)

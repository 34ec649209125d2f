"""Launches the inference kernels of mixture-of-head attention, and registers them as one operator without gradient."""

import contextlib
import math
from dataclasses import dataclass

import torch
import triton

from . import kernels


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def split_channels(dim: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """A head's channels as one power of two, or two where that computes less (72 as 64 + 16, not 128).

    Two parts in float32 alone: on an H100 with Triton 3.6 the second product into one accumulator gave wrong sums for
    16-bit heads of 72 channels (relative error 0.6), and of 96 without pipelining.
    """
    whole = max(16, triton.next_power_of_2(dim))
    if dtype != torch.float32:
        return whole, 0
    first = whole // 2
    if first < 16 or dim <= first:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dim - first))
    return (first, rest) if first + rest < whole else (whole, 0)


def pick_tiles(dim: int, dtype: torch.dtype) -> Tiles:
    row = sum(split_channels(dim, dtype)) * dtype.itemsize  # bytes
    if row <= 160:
        return Tiles(128, 64, 4, 3)
    if row <= 256:
        return Tiles(128, 64, 8, 2)
    if row <= 512:
        return Tiles(64, 32, 4, 2)
    return Tiles(32, 16, 4, 1)


def forward(q, k, v, gates, scale: float, tiles: Tiles | None = None) -> torch.Tensor:
    """(B, N, H, D); a head of a token with gate 0 is 0, and costs its share of one memset."""
    B, N, heads, dim = q.shape
    M = k.shape[1]
    tiles = tiles or pick_tiles(dim, q.dtype)
    out = q.new_zeros((B, N, heads, dim))
    if out.numel() == 0 or M == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    order = torch.empty((B, heads, N), dtype=torch.int32, device=q.device)
    count = torch.empty((B, heads), dtype=torch.int32, device=q.device)
    first, rest = split_channels(dim, q.dtype)
    precision = "ieee"
    if q.dtype == torch.float32:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    per_head = triton.cdiv(N, tiles.queries)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    unit = math.gcd(16 // q.element_size(), *strides)  # a load takes at most 16 bytes
    strides = [s // unit for s in strides]
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernels.choosers[(B * heads,)](
            gates, order, count, *gates.stride(), N, heads, CHUNK=min(1024, triton.next_power_of_2(N)), num_warps=4
        )
        kernels.moh_forward[(B * heads * per_head,)](
            q, k, v, gates, out, order, count,
            *strides[:9], *gates.stride(), *strides[9:],
            N, M, heads, per_head, scale * math.log2(math.e),
            D=dim, D1=first, D2=rest, BM=tiles.queries, BN=tiles.keys, PREC=precision, UNIT=unit,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


@torch.library.custom_op("visionattn::moh_attention", mutates_args=())
def moh_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, scale: float
) -> torch.Tensor:
    return forward(q, k, v, gates, scale)


@moh_attention_op.register_fake
def _(q, k, v, gates, scale):
    return q.new_empty(q.shape)

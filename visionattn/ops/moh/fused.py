"""Launches the inference kernels of mixture-of-head attention, and registers them as one operator without gradient."""

import contextlib
import functools
import math
import os
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from visionattn.ops._triton import give_up

from . import kernels

FORWARD_CHOICES = ("auto", "triton", "gluon")
forward_choice = os.environ.get("VISIONATTN_MOH_FORWARD", "auto")
if forward_choice not in FORWARD_CHOICES:
    raise ValueError(f"VISIONATTN_MOH_FORWARD={forward_choice!r}: use one of {', '.join(FORWARD_CHOICES)}")


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, warps, pipeline stages.

    halves: the last tile of a head's queries is cut to half where that holds them. tma: keys and values are read
    through descriptors, where their strides allow it. registers: at most so many a thread.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    halves: bool = True
    tma: bool = False
    registers: int | None = None


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


def pick_tiles(dim: int, dtype: torch.dtype, capability: int = 80) -> Tiles:
    row = sum(split_channels(dim, dtype)) * dtype.itemsize  # bytes
    tma = capability >= 90 and dtype.itemsize == 2
    if row <= 160:
        if tma:
            return Tiles(128, 64, 4, 3, tma=True, registers=168)  # three programs on a multiprocessor
        return Tiles(128, 64, 8, 3)  # with 4 warps, mma (not wgmma) spills
    if row <= 256:
        return Tiles(128, 64, 8, 2, halves=False, tma=tma)
    if row <= 512:
        return Tiles(64, 32, 4, 2, halves=False)
    return Tiles(32, 16, 4, 1, halves=False)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def suits_descriptor(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe it: an aligned address, and strides that are multiples of 16 bytes."""
    used = [s * x.element_size() for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s % 16 == 0 and 0 < s < 2**40 for s in used)


def describe(x: torch.Tensor, keys: int, channels: int) -> TensorDescriptor:
    """Tiles of `keys` tokens and `channels` channels of one head of x (B, M, H, D)."""
    # the stride of an axis of one entry says nothing, but has to be a multiple of 16 bytes
    strides = [s if n > 1 else 4096 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, keys, 1, channels])


def list_tokens(gates: torch.Tensor, parts: int = 0) -> tuple[torch.Tensor, ...]:
    """Two of int32: (B, heads, N), a head's tokens, those that chose it first; and their number, (B, heads).

    With `parts`: the tokens that chose a head alone, (B, heads, N); items of up to parts x 64 of them, (most, 3) (what
    kernels._schedule writes); the others as rows of the output, (B * N * heads,); and the numbers of both, (2,).
    """
    B, N, heads = gates.shape
    new = functools.partial(torch.empty, dtype=torch.int32, device=gates.device)
    order = new((B, heads, N))
    count = work = zeros = totals = None
    if parts:
        work = new((B * heads * triton.cdiv(triton.cdiv(N, 64), parts), 3))
        zeros = new(B * N * heads)
        totals = torch.zeros(2, dtype=torch.int32, device=gates.device)
    else:
        count = new((B, heads))
    together = min(4, triton.next_power_of_2(heads))
    groups = triton.cdiv(heads, together)
    chunk = min(1024, triton.next_power_of_2(N))
    with torch.cuda.device(gates.device) if gates.is_cuda else contextlib.nullcontext():
        kernels.partition[(B * groups,)](
            gates, order, count, work, zeros, totals, *gates.stride(), N, heads, groups, CHUNK=chunk, HEADS=together,
            PARTS=parts, num_warps=8 if chunk > 256 else 4,
        )  # fmt: skip
    return (order, work, zeros, totals) if parts else (order, count)


def forward(q, k, v, gates, scale: float, tiles: Tiles | None = None, listed=None) -> torch.Tensor:
    """(B, N, H, D); a head of a token with gate 0 is 0. `listed`: what :func:`list_tokens` returned for the gates."""
    B, N, heads, dim = q.shape
    M = k.shape[1]
    tiles = tiles or pick_tiles(dim, q.dtype, _capability(q.device))
    if q.numel() == 0 or M == 0:
        return q.new_zeros((B, N, heads, dim))
    out = torch.empty((B, N, heads, dim), dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    order, count = listed or list_tokens(gates)
    first, rest = split_channels(dim, q.dtype)
    precision = "ieee"
    if q.dtype == torch.float32:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    per_head = triton.cdiv(N, tiles.queries)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    unit = math.gcd(16 // q.element_size(), *strides)  # a load takes at most 16 bytes
    strides = [s // unit for s in strides]
    tma = tiles.tma and rest == 0 and suits_descriptor(k) and suits_descriptor(v)
    keys, values = (describe(x, tiles.keys, first) for x in (k, v)) if tma else (k, v)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernels.moh_forward[(B * heads * per_head,)](
            q, keys, values, gates, out, order, count,
            *strides[:9], *gates.stride(), *strides[9:],
            N, M, heads, per_head, scale * math.log2(math.e),
            D=dim, D1=first, D2=rest, BM=tiles.queries, BN=tiles.keys, PREC=precision, UNIT=unit, TMA=tma,
            HALVES=tiles.halves and tiles.queries > 16, num_warps=tiles.warps, num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )  # fmt: skip
    return out


def best_forward(q, k, v, gates, scale: float) -> torch.Tensor:
    """:func:`forward`, or gluon.forward where that was measured to be faster (or VISIONATTN_MOH_FORWARD says so)."""
    from . import gluon

    setting = gluon.choose(q, k, v, forward_choice)
    if setting is not None:
        try:
            return gluon.forward(q, k, v, gates, scale, setting)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            if forward_choice == "gluon":
                raise
            give_up(gluon.failed, e, "moh_attention runs Triton's kernel, not Gluon's")
    return forward(q, k, v, gates, scale)


@torch.library.custom_op("visionattn::moh_attention", mutates_args=())
def moh_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, scale: float
) -> torch.Tensor:
    return best_forward(q, k, v, gates, scale)


@moh_attention_op.register_fake
def _(q, k, v, gates, scale):
    return q.new_empty(q.shape)

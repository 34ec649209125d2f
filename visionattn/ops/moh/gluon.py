"""Launches the Gluon kernel of kernels_hopper.py: mixture-of-head attention on GPUs of compute capability 9.0."""

import math
from dataclasses import dataclass

import torch
import triton

from visionattn.ops._triton import cannot_build_gluon

from . import fused

KERNELS = "visionattn.ops.moh.kernels_hopper"


@dataclass(frozen=True)
class Setting:
    """Warpgroups of 64 queries, keys of a tile, tiles in flight; registers per thread: warpgroups', loading warp's.

    programs: of one multiprocessor. turns: two warpgroups issue their products in turns.
    lazy: the running maximum may lag (ops/_hopper.softmax).
    """

    groups: int = 2
    keys: int = 128
    stages: int = 4
    registers: tuple[int, int] = (232, 40)
    programs: int = 1
    turns: bool = True
    lazy: bool = False

    @property
    def cap(self) -> int:
        """What ptxas is told: registers of a thread before the warps part."""
        threads = 128 * (self.groups + 1) * self.programs  # the loading warp gets the registers of four
        return min(256, 65536 // threads) // 8 * 8


SETTING = Setting()
# Versions of triton with which it ran: it compiles for others too, but a deadlock could not be caught.
MEASURED = ("3.6.",)
RAN = (64, 72)  # channels of a head that it ran with; with 80 it was compiled only
failed: list[str] = []


def reason(q, k, v) -> str | None:
    """Why the kernel can't run on these arguments, or None."""
    never = _static_reason(q.device, q.dtype, q.shape[3])
    if never is not None:
        return never
    if q.shape[1] == 0 or k.shape[1] == 0:
        return "needs a token"
    if not all(x.stride(-1) == 1 and fused.suits_descriptor(x) for x in (q, k, v)):
        return "needs addresses and strides of q, k and v that are multiples of 16 bytes"
    return cannot_build_gluon(KERNELS)


def _static_reason(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {dtype}"
    if dim not in (64, 72, 80):
        return f"needs heads of 64, 72 or 80 channels, got {dim}"
    return None


def taken(device: torch.device, dtype: torch.dtype, dim: int, which: str) -> bool:
    """Whether tensors like these run with it, if their strides allow it.

    which: ``'auto'`` takes it with the versions of triton and the heads that it ran with, ``'gluon'`` wherever it can
    run, ``'triton'`` never.
    """
    if which == "triton":
        return False
    if which == "auto" and (failed or dim not in RAN or not triton.__version__.startswith(MEASURED)):
        return False
    return _static_reason(device, dtype, dim) is None and cannot_build_gluon(KERNELS) is None


def choose(q, k, v, which: str) -> Setting | None:
    """What the kernel runs with, or None for the Triton kernel; see :func:`taken`.

    With 64 channels Triton's is as fast or faster below 8192 keys (docs/moh.md).
    """
    if which == "auto" and q.shape[3] == 64 and k.shape[1] < 8192:
        return None
    return SETTING if taken(q.device, q.dtype, q.shape[3], which) and reason(q, k, v) is None else None


def _describe(x: torch.Tensor, keys: int, channels: int):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    found = fused.describe(x, keys, channels)
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(found.block_shape, element)
    return TensorDescriptor(x, found.shape, found.strides, found.block_shape, layout)


def launch_arguments(q, k, v, gates, out, lists, scale: float, setting: Setting):
    """Positional and named arguments of the kernel, without the warps."""
    N, heads, dim = q.shape[1:]
    narrow = (_describe(k, setting.keys, 16), _describe(v, setting.keys, 16)) if dim > 64 else (None, None)
    unit = 16 // q.element_size()
    strides = [[s // unit for s in x.stride()[:3]] for x in (q, out)]
    args = (
        q, _describe(k, setting.keys, 64), _describe(v, setting.keys, 64), *narrow, gates, out, *lists,
        *strides[0], *gates.stride(), *strides[1], N, k.shape[1], heads, scale * math.log2(math.e),
    )  # fmt: skip
    named = dict(
        D=dim, D1=64, BN=setting.keys, GROUPS=setting.groups, STAGES=setting.stages, UNIT=unit,
        TURNS=setting.turns and setting.groups == 2,
        LAZY=setting.lazy, REGISTERS=setting.registers,
    )  # fmt: skip
    return args, named


def forward(q, k, v, gates, scale: float, setting: Setting = SETTING, listed=None) -> torch.Tensor:
    """(B, N, H, D), as fused.forward. `listed`: what fused.list_tokens(gates, setting.groups) returned."""
    from . import kernels_hopper

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lists = listed or fused.list_tokens(gates, setting.groups)
    args, named = launch_arguments(q, k, v, gates, out, lists, scale, setting)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = setting.programs * processors
    with torch.cuda.device(q.device):
        kernels_hopper.forward_kernel[(programs,)](*args, **named, num_warps=4, maxnreg=setting.cap)
    return out

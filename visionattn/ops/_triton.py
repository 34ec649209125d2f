"""Where Triton kernels can run at all, and which of them ``'auto'`` takes."""

import os
import warnings
from functools import cache
from importlib import import_module

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# VISIONATTN_KERNELS: 'auto' (what IN_AUTO says), 'triton' (all kernels below), 'torch' (none of them)
KERNELS = os.environ.get("VISIONATTN_KERNELS", "auto")
if KERNELS not in ("auto", "triton", "torch"):
    raise ValueError(f"VISIONATTN_KERNELS={KERNELS} is unknown: use auto, triton or torch")
# kernels that passed their tests on a GPU and were faster there in whole models; the models of the others wait for the
# CPU, and their kernels took no load off it
IN_AUTO = {
    "block_norm": True,  # the norm of large models, TransNeXt's
    "conv_glu": True,
    "depthwise": False,
    "depthwise_part": False,
    "head_gates": True,
    "inline": False,
    "mala": True,
    "norm": False,
}


# kernels that compiled programs take where no gradient is wanted: there the CPU is out of the way, and on an H100 they
# made InLine's networks 1.2 to 1.5 times as fast and Agent's DeiT 1.05 times; MALA's and those of dense values did not
IN_PROGRAMS = frozenset({"depthwise_part", "inline"})


@torch.jit.unused
def in_auto(operator: str) -> bool:
    """Whether ``'auto'`` takes the kernel of this operator where it can run.

    In compiled programs :data:`IN_PROGRAMS` decides (the compiler fuses PyTorch's operators). Never in exported ones,
    and not under ``torch.func``'s transforms, whose tensors have no memory to read.
    """
    if KERNELS != "auto":
        return KERNELS == "triton"
    if torch.compiler.is_compiling():
        return operator in IN_PROGRAMS and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return IN_AUTO[operator] and torch._C._functorch.peek_interpreter_stack() is None


@torch.compiler.assume_constant_result  # the compiler can't look into triton's settings
def cannot_run(device: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on tensors of this device and dtype; None where they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported: use float16, bfloat16 or float32"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not device.startswith("cuda"):
        if triton.knobs.runtime.interpret:
            return None
        return f"the kernels run on CUDA, these tensors are on {device}"
    return _cannot_run_on(device)


@cache
def _cannot_run_on(device: str) -> str | None:
    if torch.version.hip is not None:
        return "the kernels were not tried on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.0"
    return None


@torch.compiler.assume_constant_result
def lacks_shared_memory(device: str, needed: int) -> str | None:
    """Why a program of `needed` KiB of shared memory can't run on this device; None where it can."""
    if not device.startswith("cuda"):
        return None  # interpreted
    properties = torch.cuda.get_device_properties(device)
    there = getattr(properties, "shared_memory_per_block_optin", None)  # not in every torch
    if there is None or needed <= there // 1024:
        return None
    return f"needs {needed} KiB of shared memory, this GPU has {there // 1024}"


def give_up(failed: list[str], error: Exception, instead: str) -> None:
    """Adds to the list why a kernel failed to compile or to start, and says the first time what runs instead."""
    lines = str(error).strip().splitlines() or [""]
    failed.append(f"{type(error).__name__}: {lines[0][:300]}")
    if len(failed) == 1:
        warnings.warn(f"{instead}, which failed: {failed[0]}", stacklevel=3)


@cache
def cannot_build_gluon(kernels: str) -> str | None:
    """Why the Gluon kernels of a module (its full name) cannot be built here; None where they can."""
    import triton

    if triton.knobs.runtime.interpret:
        return "Gluon has no interpreter"
    try:
        import_module(kernels)
    except Exception as e:  # Gluon is experimental: names move between versions
        return f"needs Gluon as in triton 3.6 to 3.8: {type(e).__name__}: {e}"
    return None

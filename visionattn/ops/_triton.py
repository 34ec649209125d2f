"""Where Triton kernels can run at all."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    if torch.version.hip is not None:
        return "the kernels were not tried on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.0"
    return None

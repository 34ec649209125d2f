"""The inner part of the convolutional GLU of TransNeXt (CVPR 2024, arXiv 2311.17132, section 3.4)."""

import torch
import torch.nn.functional as F

from ._triton import cannot_run, in_auto

BACKENDS = ("auto", "reference", "triton")


def conv_glu_reference(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, grid: tuple[int, int]
) -> torch.Tensor:
    """:func:`conv_glu` by PyTorch's operators."""
    a, v = h.chunk(2, dim=-1)
    C = a.shape[2]
    a = a.transpose(1, 2).reshape(a.shape[0], C, grid[0], grid[1])
    return F.gelu(F.conv2d(a, weight, bias, padding=1, groups=C).flatten(2).transpose(1, 2)) * v


def conv_glu(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    backend: str = "auto",
    taps: torch.Tensor | None = None,
) -> torch.Tensor:
    """``gelu(conv(a) + bias) * v`` of h = (a, v): a 3 x 3 depthwise convolution of tokens on their grid, zeros around.

    Args:
        h: (B, H * W, 2 C), tokens row by row.
        weight: (C, 1, 3, 3).
        bias: (C) or None.
        grid: (H, W).
        backend: ``'reference'``: PyTorch's operators. ``'triton'``: one kernel, two in backward, which keep only h; on
            CUDA, not for float64, no second derivative. ``'auto'``: the kernel where
            :data:`visionattn.ops._triton.IN_AUTO` has it and it can run.
        taps: :func:`taps_of` the weight, if the caller keeps it; read where no gradient is wanted.

    Returns:
        (B, H * W, C) in h's dtype.

    Raises:
        ValueError: for an unknown backend, shapes that disagree, or a backend that cannot run here.
    """
    _check(h, weight, bias, grid, backend)
    reason = None
    if backend == "triton":
        reason = cannot_run(str(h.device), h.dtype)
        if reason is not None:
            raise ValueError(f"conv_glu: backend='triton' cannot run: {reason}: use 'auto' or 'reference'")
    if backend == "triton" or (backend == "auto" and takes_kernel(h)):
        return _triton(h, weight, bias, grid, taps)
    return conv_glu_reference(h, weight, bias, grid)


def takes_kernel(h: torch.Tensor) -> bool:
    """Whether ``'auto'`` takes the kernel for h."""
    if not h.is_cuda or not in_auto("conv_glu") or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap and its like have no memory to read
        return False
    return cannot_run(str(h.device), h.dtype) is None


def taps_of(weight: torch.Tensor) -> torch.Tensor:
    """(C, 1, 3, 3) to (9, C): a tile's channels side by side. As PyTorch has them, their loads outweigh the tokens'."""
    return weight.reshape(-1, 9).t().contiguous()


def _triton(h, weight, bias, grid, taps) -> torch.Tensor:
    from . import conv_glu_triton  # triton is imported by whoever runs it

    if torch.compiler.is_compiling():
        return conv_glu_triton.conv_glu_op(h, weight, bias, *grid)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, weight, bias)):
        return conv_glu_triton.ConvGLUFunction.apply(h, weight, bias, *grid)
    return conv_glu_triton.forward(h, taps_of(weight) if taps is None else taps, bias, *grid)


def _check(h, weight, bias, grid, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"conv_glu: backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if h.dim() != 3 or h.shape[2] % 2 != 0 or h.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"conv_glu: h has shape {list(h.shape)}: a grid {tuple(grid)} needs (B, H * W, 2 C)")
    C = h.shape[2] // 2
    if weight.shape != (C, 1, 3, 3) or (bias is not None and bias.shape != (C,)):
        raise ValueError(
            f"conv_glu: weight has shape {list(weight.shape)}: {C} channels need [{C}, 1, 3, 3], bias [{C}]"
        )

"""A small depthwise convolution of tokens on a grid, added to other tokens: what linear attention adds to its output.

Agent attention adds the depthwise convolution of its values (ECCV 2024, arXiv 2312.08874, section 4.2), InLine
attention one whose kernels are predicted per image (NeurIPS 2024, arXiv 2412.06590, section 4.3).
"""

import torch
import torch.nn.functional as F

from ._triton import cannot_run, in_auto


def kernel_side(weight: torch.Tensor) -> int:
    """3 or 5, for kernels (images, C, 9 or 25)."""
    if weight.shape[2] == 9:
        return 3
    if weight.shape[2] == 25:
        return 5
    raise ValueError(f"depthwise_residual: weight has {weight.shape[2]} taps: give 9 (3 x 3) or 25 (5 x 5)")


def depthwise_residual_reference(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """:func:`depthwise_residual`, as shifted products: the oracle."""
    H, W = grid
    B, C = v.shape[0], v.shape[2]
    side = kernel_side(weight)
    pad = side // 2
    padded = F.pad(v[:, num_prefix_tokens:].reshape(B, H, W, C), (0, 0, pad, pad, pad, pad))
    local = torch.zeros(B, H, W, C, dtype=v.dtype, device=v.device)
    for tap in range(side * side):
        y, x = tap // side, tap % side
        local = local + padded[:, y : y + H, x : x + W] * weight[:, None, None, :, tap]
    if bias is not None:
        local = local + bias
    local = local.reshape(B, H * W, C)
    if num_prefix_tokens > 0:
        return torch.cat([out[:, :num_prefix_tokens], out[:, num_prefix_tokens:] + local], dim=1)
    return out + local


def depthwise_residual_conv(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """:func:`depthwise_residual` by PyTorch's convolution; kernels per image become B * C groups."""
    H, W = grid
    B, C = v.shape[0], v.shape[2]
    x = v[:, num_prefix_tokens:].reshape(B, H, W, C).permute(0, 3, 1, 2)
    side = kernel_side(weight)
    if weight.shape[0] == 1:
        kernel = weight.reshape(C, 1, side, side).to(x.dtype)
        local = F.conv2d(x, kernel, bias, padding=side // 2, groups=C)
    else:
        kernel = weight.reshape(B * C, 1, side, side)
        local = F.conv2d(x.reshape(1, B * C, H, W), kernel, None, padding=side // 2, groups=B * C)
        local = local.reshape(B, C, H, W)
        if bias is not None:
            local = local + bias[:, None, None]
    local = local.flatten(2).transpose(1, 2)
    if num_prefix_tokens > 0:
        return torch.cat([out[:, :num_prefix_tokens], out[:, num_prefix_tokens:] + local], dim=1)
    return out + local


@torch.jit.unused
def can_run_triton(out: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the Triton kernels can't run on these tensors; None where they can."""
    if out.dtype == torch.float64 or v.dtype == torch.float64:
        return "its sums are float32, the tensors float64"
    if torch.onnx.is_in_onnx_export():
        return "the export needs PyTorch's own operators"
    reason = cannot_run(str(out.device), out.dtype)
    return cannot_run(str(v.device), v.dtype) if reason is None else reason


@torch.jit.unused
def _name(v: torch.Tensor) -> str:
    """PyTorch's convolution needs a copy of values that are part of a projection's output, not of dense ones."""
    return "depthwise" if v.stride(1) == v.shape[2] else "depthwise_part"


@torch.jit.unused
def _triton(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    from . import depthwise_triton  # triton is imported by whoever runs it

    run = depthwise_triton.launch
    if torch.compiler.is_compiling():
        run = depthwise_triton.depthwise_residual_op
    elif torch.is_grad_enabled():
        run = depthwise_triton.DepthwiseFunction.apply
    return run(out, v, weight, bias, grid[0], grid[1], num_prefix_tokens)


def depthwise_residual(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """``out`` plus the 3 x 3 or 5 x 5 depthwise convolution (padded with zeros to the same size) of ``v`` on its grid.

    Args:
        out: (B, P + H * W, C); its P prefix tokens pass unchanged.
        v: (B, P + H * W, C), any strides.
        weight: (1, C, 9), or (B, C, 9) for kernels per image; taps row by row; 25 in place of 9 for 5 x 5.
        bias: (C) or None.
        grid: (H, W).
        num_prefix_tokens: P.
        backend: ``'reference'``, ``'conv'``, ``'triton'`` (one kernel that reads v where it lies), or ``'auto'``: the
            kernel where :data:`visionattn.ops._triton.IN_AUTO` has it and it can run, else the convolution.

    Raises:
        ValueError: for an unknown backend, or one that can't run here.
    """
    if not torch.jit.is_scripting() and (backend == "triton" or (backend == "auto" and in_auto(_name(v)))):
        kernel_side(weight)
        reason = can_run_triton(out, v)
        if reason is None:
            return _triton(out, v, weight, bias, grid, num_prefix_tokens)
        if backend == "triton":
            raise ValueError(f"depthwise_residual: backend 'triton' can't run: {reason}: use 'auto' or 'conv'")
    if backend == "reference":
        return depthwise_residual_reference(out, v, weight, bias, grid, num_prefix_tokens)
    if backend == "conv" or backend == "auto":
        return depthwise_residual_conv(out, v, weight, bias, grid, num_prefix_tokens)
    raise ValueError(f"depthwise_residual: backend {backend} is unknown: use one of auto, reference, conv, triton")

"""A 3 x 3 depthwise convolution of tokens on a grid, added to other tokens: what linear attention adds to its output.

Agent attention adds the depthwise convolution of its values (ECCV 2024, arXiv 2312.08874, section 4.2), InLine attention
one whose kernels are predicted per image (NeurIPS 2024, arXiv 2412.06590, section 4.3).
"""

import torch
import torch.nn.functional as F


def depthwise_residual_reference(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """:func:`depthwise_residual`, as nine shifted products: the oracle."""
    H, W = grid
    B, C = v.shape[0], v.shape[2]
    padded = F.pad(v[:, num_prefix_tokens:].reshape(B, H, W, C), (0, 0, 1, 1, 1, 1))
    local = torch.zeros(B, H, W, C, dtype=v.dtype, device=v.device)
    for tap in range(9):
        y, x = tap // 3, tap % 3
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
    if weight.shape[0] == 1:
        local = F.conv2d(x, weight.reshape(C, 1, 3, 3).to(x.dtype), bias, padding=1, groups=C)
    else:
        local = F.conv2d(x.reshape(1, B * C, H, W), weight.reshape(B * C, 1, 3, 3), None, padding=1, groups=B * C)
        local = local.reshape(B, C, H, W)
        if bias is not None:
            local = local + bias[:, None, None]
    local = local.flatten(2).transpose(1, 2)
    if num_prefix_tokens > 0:
        return torch.cat([out[:, :num_prefix_tokens], out[:, num_prefix_tokens:] + local], dim=1)
    return out + local


def depthwise_residual(
    out: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """``out`` plus the 3 x 3 depthwise convolution (zero padding 1) of ``v`` on its grid.

    Args:
        out: (B, P + H * W, C); its P prefix tokens pass unchanged.
        v: (B, P + H * W, C), any strides.
        weight: (1, C, 9), or (B, C, 9) for kernels per image; taps row by row.
        bias: (C) or None.
        grid: (H, W).
        num_prefix_tokens: P.
        backend: ``'reference'``, ``'conv'``, or ``'auto'``.

    Raises:
        ValueError: for an unknown backend.
    """
    if backend == "reference":
        return depthwise_residual_reference(out, v, weight, bias, grid, num_prefix_tokens)
    if backend == "conv" or backend == "auto":
        return depthwise_residual_conv(out, v, weight, bias, grid, num_prefix_tokens)
    raise ValueError(f"depthwise_residual: backend {backend} is unknown: use one of auto, reference, conv")

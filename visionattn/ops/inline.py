"""InLine attention (NeurIPS 2024, arXiv 2412.06590): linear attention whose rows are normalised by subtraction."""

import torch
import torch.nn.functional as F

from ._triton import in_auto
from .depthwise import can_run_triton, depthwise_residual

KERNELS = ("identity", "relu", "leakyrelu", "exp")


def feature_map(x: torch.Tensor, kernel: str) -> torch.Tensor:
    """phi: ``'identity'``, ``'relu'``, ``'leakyrelu'`` (slope 0.01), or ``'exp'`` (of 0.2 x)."""
    if kernel == "identity":
        return x
    if kernel == "relu":
        return F.relu(x)
    if kernel == "leakyrelu":
        return F.leaky_relu(x, 0.01)
    if kernel == "exp":
        return torch.exp(0.2 * x)
    raise ValueError(f"kernel {kernel} is unknown: use identity, relu, leakyrelu or exp")


def inline_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 5 of the paper with its N x N weights: ``s_ij - mean_m s_im + 1 / N``.

    Returns:
        The output (B, N, H, D) and the weights (B, H, N, M), whose rows sum to 1 and which may be negative.
    """
    tokens = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale / tokens)
    weights = scores - scores.mean(dim=-1, keepdim=True) + 1.0 / tokens
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), weights


def inline_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """InLine attention in two products, linear in the number of tokens.

    ``out_i = mean(v) + scale * q_i cov(k, v)``, which is equation 5 with its sums carried out: the D x D covariance of
    keys and values holds both the product and the subtraction.

    Args:
        q: (B, N, H, D), the feature map applied.
        k, v: (B, M, H, D), the feature map applied to k.
        scale: D^-0.5 by default; the released code has scale / M where the paper's equation has 1.
        backend: ``'reference'`` (N x M weights), ``'matmul'``, or ``'auto'``.

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: for an unknown backend.
    """
    if backend == "reference":
        return inline_attention_reference(q, k, v, scale)[0]
    if backend != "auto" and backend != "matmul":
        raise ValueError(f"inline_attention: backend {backend} is unknown: use one of auto, reference, matmul")
    B, N, H, D = q.shape
    M = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k_mean, v_mean = k.mean(dim=2, keepdim=True), v.mean(dim=2, keepdim=True)
    # the factor is applied inside the products, to sums in float32: in float16 k^T v itself overflows
    outer = torch.matmul(k_mean.transpose(2, 3), v_mean).reshape(B * H, D, D)
    covariance = torch.baddbmm(
        outer,
        k.reshape(B * H, M, D).transpose(1, 2),
        v.reshape(B * H, M, D),
        beta=-scale,
        alpha=scale / M,
    )
    out = torch.baddbmm(v_mean.reshape(B * H, 1, D), q.reshape(B * H, N, D), covariance)
    return out.reshape(B, H, N, D).transpose(1, 2)


@torch.jit.unused
def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float,
) -> torch.Tensor:
    from . import inline_triton  # triton is imported by whoever runs it

    args = (q, k, v, weight, bias, heads, grid[0], grid[1], num_prefix_tokens, scale)
    if torch.compiler.is_compiling():
        return inline_triton.inline_mix_op(*args)[0]
    if torch.is_grad_enabled():
        return inline_triton.InLineFunction.apply(*args)
    return inline_triton.launch(*args)[0]


def inline_mix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """InLine attention plus its local residual, a 3 x 3 depthwise convolution of the values (section 4.3).

    Args:
        q, k, v: (B, P + H * W, C), any strides, the feature map applied to q and k; heads lie side by side.
        weight: (B, C, 9) kernels per image (or (1, C, 9) for all), taps row by row; they act on the grid's tokens.
        bias: (C) or None, of the convolution.
        heads: number of heads; divides C.
        grid: (H, W).
        num_prefix_tokens: P; these take part in the attention only.
        scale: (C / heads)^-0.5 by default.
        backend: ``'reference'`` (N x N weights), ``'matmul'``, ``'triton'`` (few launches, no copies), or ``'auto'``:
            the kernels where :data:`visionattn.ops._triton.IN_AUTO` has them and they can run, else the products.

    Returns:
        (B, P + H * W, C).

    Raises:
        ValueError: for an unknown backend, or one that can't run here.
    """
    B, N, C = q.shape
    D = C // heads
    factor = D**-0.5 if scale is None else scale
    if not torch.jit.is_scripting() and (backend == "triton" or (backend == "auto" and in_auto("inline"))):
        # wider heads: a D x D product per tile would spill
        reason = can_run_triton(q, v) if D <= 64 else f"heads of {D} channels are wider than 64"
        if reason is None:
            return _triton(q, k, v, weight, bias, heads, grid, num_prefix_tokens, factor)
        if backend == "triton":
            raise ValueError(f"inline_mix: backend 'triton' can't run: {reason}: use 'auto' or 'matmul'")
    local = "conv" if backend == "matmul" else backend
    out = inline_attention(
        q.reshape(B, N, heads, D), k.reshape(B, N, heads, D), v.reshape(B, N, heads, D), factor, backend
    )
    out = out.reshape(B, N, C)
    return depthwise_residual(out, v, weight, bias, grid, num_prefix_tokens, local)

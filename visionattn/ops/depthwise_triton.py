"""Triton kernels of the depthwise residual: values are read where they lie (any strides), the sum is written once.

``visionattn::depthwise_residual`` and its two gradients are custom operators: compile and export see through them.
Products are summed in float32 whatever the dtypes, which may differ: under autocast no weight needs a cast.
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, Plans, on_device

BLOCK_N = 32  # of the convolution; 64 take so many registers that few programs run at the same time
WARPS = 4
WEIGHT_BLOCK_N = 64
WEIGHT_CHUNK = 512  # tokens that one program of the weight gradient sums


@triton.jit
def _conv_kernel(
    y_ptr, r_ptr, v_ptr, w_ptr, b_ptr,
    C, T, P, H, W,
    r_b, r_t, v_b, v_t, w_b,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = r + conv(v) + b on the grid's tokens, y = r (or 0) on the P before them."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    in_t, in_c = t < T, c < C
    n = t - P
    row, column = n // W, n % W
    on_grid = (n >= 0) & in_t
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tap in tl.static_range(K * K):
        dy = tap // K - K // 2
        dx = tap % K - K // 2
        inside = on_grid & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        place = v_ptr + b * v_b + (t + dy * W + dx)[:, None] * v_t + c[None, :]
        v = tl.load(place, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        at = w_ptr + b * w_b + (K * K - 1 - tap if FLIP else tap) * C + c
        acc += v * tl.load(at, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        bias = tl.load(b_ptr + c, mask=in_c, other=0.0).to(tl.float32)
        acc += tl.where(on_grid[:, None], bias[None, :], 0.0)
    mask = in_t[:, None] & in_c[None, :]
    if RESIDUAL:
        acc += tl.load(r_ptr + b * r_b + t[:, None] * r_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = y_ptr + b * T * C + t[:, None] * C + c[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    part_ptr, g_ptr, v_ptr,
    C, N, P, H, W, chunks,
    g_b, g_t, v_b, v_t,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[b, chunk, tap, c] = sum over the chunk's tokens of g * shifted v; the last tap is the sum of g."""
    chunk = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    in_c = c < C
    part = part_ptr + (b * chunks + chunk) * (K * K + 1) * C + c
    for tap in tl.static_range(K * K + 1):
        dy = tap // K - K // 2
        dx = tap % K - K // 2
        acc = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, CHUNK, BLOCK_N):
            n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
            row, column = n // W, n % W
            inside = n < N
            if tap < K * K:
                inside = inside & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
            mask = inside[:, None] & in_c[None, :]
            g = tl.load(g_ptr + b * g_b + (n + P)[:, None] * g_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if tap < K * K:
                place = v_ptr + b * v_b + (n + P + dy * W + dx)[:, None] * v_t + c[None, :]
                g *= tl.load(place, mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(g, axis=0)
        tl.store(part + tap * C, acc, mask=in_c)


def _block_c(C: int) -> int:
    return min(64, max(16, triton.next_power_of_2(C)))


def _side(weight: torch.Tensor) -> int:
    return 3 if weight.shape[2] == 9 else 5


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Channels side by side; batch and token strides stay as they are."""
    return x if x.stride(2) == 1 else x.contiguous()


_plans = Plans()


def tap_major(weight: torch.Tensor) -> torch.Tensor:
    """(..., C, taps) as (..., taps, C) in memory, where the channels of a tap are read side by side."""
    return weight.transpose(-1, -2).contiguous()


def _conv(out, v, weight, bias, H: int, W: int, P: int, flip: bool, dtype: torch.dtype) -> torch.Tensor:
    v, weight = _rows(v), tap_major(weight)
    B, T, C = v.shape
    residual = v if out is None else _rows(out)
    given = (out is not None, bias is not None, flip)
    key = (
        v.shape, v.stride(), residual.stride(), weight.shape, H, W, P, given, dtype, v.dtype, residual.dtype,
        weight.dtype, None if bias is None else bias.dtype, v.device,
    )  # fmt: skip

    def make() -> Launch:
        block_c = _block_c(C)
        grid = (triton.cdiv(T, BLOCK_N), triton.cdiv(C, block_c), B)
        w_b = 0 if weight.shape[0] == 1 else weight.shape[1] * C
        numbers = (C, T, P, H, W, *residual.stride()[:2], *v.stride()[:2], w_b)
        side = 3 if weight.shape[1] == 9 else 5
        constants = dict(RESIDUAL=given[0], BIAS=given[1], FLIP=flip, K=side, BLOCK_N=BLOCK_N, BLOCK_C=block_c)
        return Launch(_conv_kernel, grid, numbers, constants, num_warps=WARPS)

    with on_device(v):
        y = torch.empty(B, T, C, dtype=dtype, device=v.device)
        _plans.get(key, make)(y, residual, v, weight, weight if bias is None else bias)
    return y


def launch(
    out: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int, P: int
) -> torch.Tensor:
    """The forward kernel, without the operator around it."""
    return _conv(out, v, weight, bias, H, W, P, False, out.dtype)


def weight_sums(g: torch.Tensor, v: torch.Tensor, H: int, W: int, P: int, side: int) -> torch.Tensor:
    """(B, side^2 + 1, C) in float32: for each image the gradient of its kernels' taps, then of the bias."""
    g, v = _rows(g), _rows(v)
    B, _, C = v.shape
    chunks = triton.cdiv(H * W, WEIGHT_CHUNK)
    key = ("weight", v.shape, v.stride(), g.stride(), H, W, P, side, v.dtype, g.dtype, v.device)

    def make() -> Launch:
        block_c = _block_c(C)
        numbers = (C, H * W, P, H, W, chunks, *g.stride()[:2], *v.stride()[:2])
        constants = dict(K=side, CHUNK=WEIGHT_CHUNK, BLOCK_N=WEIGHT_BLOCK_N, BLOCK_C=block_c)
        return Launch(_weight_kernel, (chunks, triton.cdiv(C, block_c), B), numbers, constants)

    with on_device(v):
        parts = torch.empty(B, chunks, side * side + 1, C, dtype=torch.float32, device=v.device)
        _plans.get(key, make)(parts, g, v)
    return parts.squeeze(1) if chunks == 1 else parts.sum(dim=1)


def gradients(g, v, weight, bias_dtype, sizes, wants) -> tuple:
    """Gradients of v, weight and bias, where ``wants`` has a True for them."""
    H, W, P = sizes
    grad_v = _conv(None, g, weight, None, H, W, P, True, v.dtype) if wants[0] else None
    grad_w = grad_b = None
    if wants[1] or wants[2]:
        taps = weight.shape[2]
        sums = weight_sums(g, v, H, W, P, _side(weight))
        if weight.shape[0] == 1:
            sums = sums.sum(dim=0, keepdim=True)
        grad_w = sums[:, :taps].transpose(1, 2).to(weight.dtype) if wants[1] else None
        grad_b = sums[:, taps].sum(dim=0).to(bias_dtype) if wants[2] and bias_dtype is not None else None
    return grad_v, grad_w, grad_b


class DepthwiseFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers would cost more than the kernels."""

    @staticmethod
    def forward(ctx, out, v, weight, bias, H, W, P):
        ctx.save_for_backward(v, weight)
        ctx.sizes, ctx.bias_dtype = (H, W, P), None if bias is None else bias.dtype
        return launch(out, v, weight, bias, H, W, P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        wants = ctx.needs_input_grad
        grads = gradients(g, *ctx.saved_tensors, ctx.bias_dtype, ctx.sizes, wants[1:4])
        return g if wants[0] else None, *grads, None, None, None


@torch.library.custom_op("visionattn::depthwise_residual", mutates_args=())
def depthwise_residual_op(
    out: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int, P: int
) -> torch.Tensor:
    return launch(out, v, weight, bias, H, W, P)


@depthwise_residual_op.register_fake
def _(out, v, weight, bias, H, W, P):
    return out.new_empty(out.shape)


@torch.library.custom_op("visionattn::depthwise_residual_grad_v", mutates_args=())
def _grad_v(g: torch.Tensor, weight: torch.Tensor, H: int, W: int, P: int, like: torch.Tensor) -> torch.Tensor:
    return _conv(None, g, weight, None, H, W, P, True, like.dtype)


@_grad_v.register_fake
def _(g, weight, H, W, P, like):
    return like.new_empty(g.shape)


@torch.library.custom_op("visionattn::depthwise_residual_grad_w", mutates_args=())
def _grad_w(g: torch.Tensor, v: torch.Tensor, H: int, W: int, P: int, side: int) -> torch.Tensor:
    return weight_sums(g, v, H, W, P, side).contiguous()


@_grad_w.register_fake
def _(g, v, H, W, P, side):
    return v.new_empty((v.shape[0], side * side + 1, v.shape[2]), dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    _, v, weight, bias, *sizes = inputs
    ctx.save_for_backward(v, weight)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, g):
    v, weight = ctx.saved_tensors
    H, W, P = ctx.sizes
    wants, taps = ctx.needs_input_grad, weight.shape[2]
    grad_v = _grad_v(g, weight, H, W, P, v) if wants[1] else None
    grad_w = grad_b = None
    if wants[2] or wants[3]:
        sums = _grad_w(g, v, H, W, P, _side(weight))
        if weight.shape[0] == 1:
            sums = sums.sum(dim=0, keepdim=True)
        grad_w = sums[:, :taps].transpose(1, 2).to(weight.dtype) if wants[2] else None
        grad_b = sums[:, taps].sum(dim=0).to(ctx.bias_dtype) if wants[3] and ctx.bias_dtype is not None else None
    return g if wants[0] else None, grad_v, grad_w, grad_b, None, None, None


depthwise_residual_op.register_autograd(_backward, setup_context=_setup)

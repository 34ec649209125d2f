"""Triton kernels of the convolutional GLU: nothing is transposed, and only fc1's output is kept for backward.

A tile holds BLOCK_N tokens (of all images, row by row) and BLOCK_C channels. With h = (a, v), c = conv(a) + bias and
the gradient g of the output:

    y = gelu(c) v;   dv = g gelu(c);   dc = g v gelu'(c);   da_m = sum_tap w_tap dc_(m - tap);
    dw_tap = sum_m a_m dc_(m - tap)

``gate_grad`` computes c again and writes dv and dc; ``conv_grad`` reads dc at the nine places around a token once, for
both da and dw. Sums are float32 and in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import Launch, Plans, on_device
from .conv_glu import taps_of


@dataclass(frozen=True)
class Tiles:
    """Tokens and channels of a tile, warps."""

    tokens: int = 64
    channels: int = 64
    warps: int = 4


@dataclass(frozen=True)
class Plan:
    """Tiles of the three kernels."""

    forward: Tiles = Tiles(32)
    gate: Tiles = Tiles(32)
    conv: Tiles = Tiles(warps=8)


DEFAULT = Plan()


@triton.jit
def _rows(T, N, W, BLOCK_N: tl.constexpr):
    """A tile's first token (64 bits), the others' distances to it, which exist, and their rows and columns."""
    first = tl.program_id(0) * BLOCK_N
    i = tl.arange(0, BLOCK_N)
    n = (first + i) % N
    return first.to(tl.int64), i, first + i < T, n // W, n % W


@triton.jit
def _shifted(x_ptr, i, inside, row, column, c, in_c, stride, H, W, dy, dx):
    """The tile moved by (dy, dx) on the grid, in float32; 0 off the map."""
    on = inside & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
    place = x_ptr + (i + dy * W + dx)[:, None] * stride + c[None, :]
    return tl.load(place, mask=on[:, None] & in_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolved(h_ptr, w_ptr, b_ptr, i, inside, row, column, c, in_c, C, H, W, BIAS: tl.constexpr):
    acc = tl.zeros([i.shape[0], c.shape[0]], tl.float32)
    for tap in tl.static_range(9):
        x = _shifted(h_ptr, i, inside, row, column, c, in_c, 2 * C, H, W, tap // 3 - 1, tap % 3 - 1)
        acc += x * tl.load(w_ptr + tap * C + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(b_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _normal_cdf(c):
    """The normal distribution's function, 0.5 (1 + erf(c / sqrt 2))."""
    return 0.5 * (1.0 + tl.erf(c * 0.7071067811865476))


@triton.jit
def _forward_kernel(
    y_ptr, h_ptr, w_ptr, b_ptr,
    T, N, C, H, W,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, i, inside, row, column = _rows(T, N, W, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    h_ptr += first * (2 * C)
    conv = _convolved(h_ptr, w_ptr, b_ptr, i, inside, row, column, c, in_c, C, H, W, BIAS)
    mask = inside[:, None] & in_c[None, :]
    v = tl.load(h_ptr + C + i[:, None] * (2 * C) + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = conv * _normal_cdf(conv) * v
    tl.store(y_ptr + first * C + i[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_grad_kernel(
    dc_ptr, dh_ptr, g_ptr, h_ptr, w_ptr, b_ptr,
    T, N, C, H, W,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, i, inside, row, column = _rows(T, N, W, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    h_ptr += first * (2 * C)
    conv = _convolved(h_ptr, w_ptr, b_ptr, i, inside, row, column, c, in_c, C, H, W, BIAS)
    mask = inside[:, None] & in_c[None, :]
    wide = C + i[:, None] * (2 * C) + c[None, :]
    narrow = first * C + i[:, None] * C + c[None, :]
    v = tl.load(h_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
    share = _normal_cdf(conv)
    slope = share + conv * 0.3989422804014327 * tl.exp(-0.5 * conv * conv)
    tl.store(dc_ptr + narrow, (g * v * slope).to(dc_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + first * (2 * C) + wide, (g * conv * share).to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _conv_grad_kernel(
    dh_ptr, part_ptr, dc_ptr, h_ptr, w_ptr,
    T, N, C, H, W,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dh's first half; part[tile, tap, c]: the tile's share of dw, and of the bias's gradient as the tenth tap."""
    first, i, inside, row, column = _rows(T, N, W, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = inside[:, None] & in_c[None, :]
    wide = first * (2 * C) + i[:, None] * (2 * C) + c[None, :]
    part_ptr += tl.program_id(0).to(tl.int64) * 10 * C + c
    dc_ptr += first * C
    a = tl.load(h_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    da = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tap in tl.static_range(9):
        dc = _shifted(dc_ptr, i, inside, row, column, c, in_c, C, H, W, 1 - tap // 3, 1 - tap % 3)
        da += dc * tl.load(w_ptr + tap * C + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        tl.store(part_ptr + tap * C, tl.sum(a * dc, axis=0), mask=in_c)
        if tap == 4:
            tl.store(part_ptr + 9 * C, tl.sum(dc, axis=0), mask=in_c)
    tl.store(dh_ptr + wide, da.to(dh_ptr.dtype.element_ty), mask=mask)


_plans = Plans()


def _launch(kernel, tensors: tuple, h: torch.Tensor, grid: tuple[int, int], tiles: Tiles, **constants) -> None:
    B, N, C = h.shape[0], h.shape[1], h.shape[2] // 2
    T = B * N
    key = (kernel, T, N, C, grid, tiles, *constants.values(), h.device, *(t.dtype for t in tensors))

    def make() -> Launch:
        block_c = min(tiles.channels, max(16, triton.next_power_of_2(C)))
        named = dict(constants, BLOCK_N=tiles.tokens, BLOCK_C=block_c)
        programs = (triton.cdiv(T, tiles.tokens), triton.cdiv(C, block_c))
        return Launch(kernel, programs, (T, N, C, *grid), named, num_warps=tiles.warps)

    _plans.get(key, make)(*tensors)


def forward(h, taps, bias, H: int, W: int, plan: Plan = DEFAULT) -> torch.Tensor:
    """(B, N, C) from (B, N, 2 C), taps (9, C) and bias (C) or None."""
    h = h.contiguous()
    y = torch.empty(h.shape[0], h.shape[1], h.shape[2] // 2, dtype=h.dtype, device=h.device)
    tensors = (y, h, taps, taps if bias is None else bias)
    with on_device(h):
        _launch(_forward_kernel, tensors, h, (H, W), plan.forward, BIAS=bias is not None)
    return y


def backward(g, h, taps, bias, H: int, W: int, plan: Plan = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of h, and (10, C) in float32: those of the nine taps and of the bias."""
    g, h = g.contiguous(), h.contiguous()
    tiles = triton.cdiv(h.shape[0] * h.shape[1], plan.conv.tokens)
    dh, dc = torch.empty_like(h), torch.empty_like(g)
    part = torch.empty(tiles, 10, taps.shape[1], dtype=torch.float32, device=h.device)
    gate = (dc, dh, g, h, taps, taps if bias is None else bias)
    with on_device(h):
        _launch(_gate_grad_kernel, gate, h, (H, W), plan.gate, BIAS=bias is not None)
        _launch(_conv_grad_kernel, (dh, part, dc, h, taps), h, (H, W), plan.conv)
    return dh, part.sum(dim=0)


def _grads(dh, sums, dtype, bias) -> tuple:
    d_weight = sums[:9].t().reshape(-1, 1, 3, 3).to(dtype)
    return dh, d_weight, None if bias is None else sums[9].to(bias.dtype), None, None


class ConvGLUFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers cost more than small kernels."""

    @staticmethod
    def forward(ctx, h, weight, bias, H, W):
        taps = taps_of(weight)
        ctx.save_for_backward(h, taps, bias)
        ctx.sizes = (H, W)
        return forward(h, taps, bias, H, W)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, taps, bias = ctx.saved_tensors
        return _grads(*backward(g, h, taps, bias, *ctx.sizes), taps.dtype, bias)


@torch.library.custom_op("visionattn::conv_glu", mutates_args=())
def conv_glu_op(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int) -> torch.Tensor:
    return forward(h, taps_of(weight), bias, H, W)


@conv_glu_op.register_fake
def _(h, weight, bias, H, W):
    return h.new_empty(h.shape[0], h.shape[1], h.shape[2] // 2)


@torch.library.custom_op("visionattn::conv_glu_backward", mutates_args=())
def conv_glu_backward_op(
    g: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return backward(g, h, taps_of(weight), bias, H, W)


@conv_glu_backward_op.register_fake
def _(g, h, weight, bias, H, W):
    return h.new_empty(h.shape), h.new_empty(10, weight.shape[0], dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    h, weight, bias, *sizes = inputs
    ctx.save_for_backward(h, weight, bias)
    ctx.sizes = sizes


def _backward(ctx, g):
    h, weight, bias = ctx.saved_tensors
    return _grads(*conv_glu_backward_op(g, h, weight, bias, *ctx.sizes), weight.dtype, bias)


conv_glu_op.register_autograd(_backward, setup_context=_setup)

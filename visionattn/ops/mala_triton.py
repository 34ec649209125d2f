"""Triton kernels of all that stands between the two projections of a MALA layer (see ``ops/linear.py``).

Forward, two launches: the state (the keys' feature map, their rotation, k^T v, the two means), and one pass over the
tokens which makes the queries' map, z, the rotation, the second product, the convolution of the values and the gate.
Many tokens are summed in chunks, which takes a third launch. The gradient has the same shape, plus the convolution's
weights. Queries, keys, values and the gate are read where the projection left them, and their gradients are
written as one tensor. ``visionattn::mala_mix`` is the operator.

A channel's partner in the rotation (the neighbour, d ^ 1) is loaded a second time, from the cache.
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, Plans, on_device
from .depthwise_triton import tap_major, weight_sums

BLOCK_N = 32  # 64 take so many registers (255) that few programs run at the same time
WARPS = 4  # 8 for heads wider than 64
CHUNK = 512
AT_ONCE = 1024  # tokens that one program sums without chunks
WIDEST = 128


@triton.jit
def _phi(x):
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def _slope(x, phi):
    """Of the feature map; below 0 it is the map itself."""
    return tl.where(x > 0, 1.0, phi)


@triton.jit
def _turn(ptr, at, at_swapped, cos, sin, mask):
    """The raw channels, their feature map, and that rotated."""
    x = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(ptr + at_swapped, mask=mask, other=0.0).to(tl.float32)
    phi = tl.where(mask, _phi(x), 0.0)
    return x, phi, phi * cos + tl.where(mask, _phi(partner), 0.0) * sin


@triton.jit
def _convolution(
    v_ptr, w_ptr, t, channel, in_d, C, v_t, N, P, H, W,
    FLIP: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The convolution of one head's channels at the tokens t, zero at the P before the grid."""
    n = t - P
    row, column = n // W, n % W
    acc = tl.zeros([BLOCK_N, DP], tl.float32)
    for y in range(0, K):  # a loop: all taps written out take the compiler half a minute, and registers
        dy = y - K // 2
        in_row = (n >= 0) & (t < N) & (row + dy >= 0) & (row + dy < H)
        for x in tl.static_range(K):
            dx = x - K // 2
            inside = in_row & (column + dx >= 0) & (column + dx < W)
            place = v_ptr + (t + dy * W + dx)[:, None] * v_t + channel[None, :]
            v = tl.load(place, mask=inside[:, None] & in_d[None, :], other=0.0).to(tl.float32)
            tap = y * K + x
            w = tl.load(w_ptr + (K * K - 1 - tap if FLIP else tap) * C + channel, mask=in_d, other=0.0)
            acc += v * w.to(tl.float32)[None, :]
    return acc


@triton.jit
def _state_kernel(
    s_ptr, sk_ptr, sv_ptr, x_ptr, sin_ptr, cos_ptr,
    N, chunks, heads, C, scale, x_b, x_t,
    LAST: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk's tokens of (rotated k)^T v, of k and of v; LAST (of one chunk): scale / N of it, the means."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    s = tl.zeros([DP, DP], tl.float32)
    sk = tl.zeros([DP], tl.float32)
    sv = tl.zeros([DP], tl.float32)
    base = x_ptr + batch * x_b + C + head * D
    for start in range(0, CHUNK, BLOCK_N):
        t = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
        mask = (t < N)[:, None] & (d < D)[None, :]
        table = t[:, None] * D + d[None, :]
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
        row = t[:, None] * x_t
        _, k, turned = _turn(base, row + d[None, :], row + (d ^ 1)[None, :], cos, sin, mask)
        v = tl.load(base + C + row + d[None, :], mask=mask, other=0.0)
        s += tl.dot(tl.trans(turned.to(v.dtype)), v, input_precision=PREC)
        sk += tl.sum(k, axis=0)
        sv += tl.sum(v.to(tl.float32), axis=0)
    if LAST:
        s, sk, sv = s * (scale / N), sk / N, sv / N
    part = bh * chunks + chunk
    square = (d < D)[:, None] & (d < D)[None, :]
    tl.store(s_ptr + part * D * D + d[:, None] * D + d[None, :], s, mask=square)
    tl.store(sk_ptr + part * D + d, sk, mask=d < D)
    tl.store(sv_ptr + part * D + d, sv, mask=d < D)


@triton.jit
def _finish_kernel(
    m_ptr, ma_ptr, mb_ptr, s_ptr, sa_ptr, sb_ptr,
    chunks, square_factor, line_factor,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Adds the chunks up, and multiplies the sums."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    square = (d < D)[:, None] & (d < D)[None, :]
    s = tl.zeros([DP, DP], tl.float32)
    sa = tl.zeros([DP], tl.float32)
    sb = tl.zeros([DP], tl.float32)
    for chunk in range(0, chunks):
        part = bh * chunks + chunk
        s += tl.load(s_ptr + part * D * D + d[:, None] * D + d[None, :], mask=square, other=0.0)
        sa += tl.load(sa_ptr + part * D + d, mask=d < D, other=0.0)
        sb += tl.load(sb_ptr + part * D + d, mask=d < D, other=0.0)
    tl.store(m_ptr + bh * D * D + d[:, None] * D + d[None, :], s * square_factor, mask=square)
    tl.store(ma_ptr + bh * D + d, sa * line_factor, mask=d < D)
    tl.store(mb_ptr + bh * D + d, sb * line_factor, mask=d < D)


@triton.jit
def _mix_kernel(
    y_ptr, x_ptr, s_ptr, mk_ptr, mv_ptr, w_ptr, b_ptr, sin_ptr, cos_ptr,
    N, P, H, W, heads, C, scale, x_b, x_t,
    BIAS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y = (beta rotated(q) s - z mean(v) + conv(v) + b) * o."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    in_d = d < D
    mask = (t < N)[:, None] & in_d[None, :]
    table = t[:, None] * D + d[None, :]
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    base, row = x_ptr + batch * x_b, t[:, None] * x_t
    column, swapped = (head * D + d)[None, :], (head * D + (d ^ 1))[None, :]
    _, q, turned = _turn(base, row + column, row + swapped, cos, sin, mask)
    mean_k = tl.load(mk_ptr + bh * D + d, mask=in_d, other=0.0)
    mean_v = tl.load(mv_ptr + bh * D + d, mask=in_d, other=0.0)
    z = scale * tl.sum(q * mean_k[None, :], axis=1)
    beta = 1.0 + 1.0 / (z + 1e-6)
    kind = x_ptr.dtype.element_ty
    square = in_d[:, None] & in_d[None, :]
    s = tl.load(s_ptr + bh * D * D + d[:, None] * D + d[None, :], mask=square, other=0.0)
    acc = tl.dot((turned * beta[:, None]).to(kind), s.to(kind), input_precision=PREC) - z[:, None] * mean_v[None, :]
    acc += _convolution(base + 2 * C, w_ptr, t, head * D + d, in_d, C, x_t, N, P, H, W, False, K, BLOCK_N, DP)
    if BIAS:
        bias = tl.load(b_ptr + head * D + d, mask=in_d, other=0.0).to(tl.float32)
        acc += tl.where((t >= P)[:, None], bias[None, :], 0.0)
    acc *= tl.load(base + 3 * C + row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + (batch * N + t[:, None]) * C + column, acc.to(kind), mask=mask)


@triton.jit
def _query_grad_kernel(
    dx_ptr, u_ptr, ds_ptr, dk_ptr, dv_ptr, g_ptr, x_ptr, s_ptr, mk_ptr, mv_ptr, w_ptr, b_ptr, sin_ptr, cos_ptr,
    N, P, H, W, chunks, heads, C, scale, x_b, x_t, g_b, g_t,
    BIAS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The gradients of q and o, u = g o (the gradient in front of the gate), and a chunk's sums for the state's."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    in_d = d < D
    square = in_d[:, None] & in_d[None, :]
    kind = x_ptr.dtype.element_ty
    column, swapped = (head * D + d)[None, :], (head * D + (d ^ 1))[None, :]
    mean_k = tl.load(mk_ptr + bh * D + d, mask=in_d, other=0.0)
    mean_v = tl.load(mv_ptr + bh * D + d, mask=in_d, other=0.0)
    at_s = s_ptr + bh * D * D
    s = tl.load(at_s + d[:, None] * D + d[None, :], mask=square, other=0.0).to(kind)
    s_swapped = tl.load(at_s + (d ^ 1)[:, None] * D + d[None, :], mask=square, other=0.0).to(kind)
    base = x_ptr + batch * x_b
    ds = tl.zeros([DP, DP], tl.float32)
    dk = tl.zeros([DP], tl.float32)
    dv = tl.zeros([DP], tl.float32)
    for start in range(0, CHUNK, BLOCK_N):
        t = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
        mask = (t < N)[:, None] & in_d[None, :]
        table = t[:, None] * D
        sin = tl.load(sin_ptr + table + d[None, :], mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + table + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sin_swapped = tl.load(sin_ptr + table + (d ^ 1)[None, :], mask=mask, other=0.0).to(tl.float32)
        row = t[:, None] * x_t
        raw, q, turned = _turn(base, row + column, row + swapped, cos, sin, mask)
        z = scale * tl.sum(q * mean_k[None, :], axis=1)
        inverse = 1.0 / (z + 1e-6)
        beta = 1.0 + inverse
        scaled = (turned * beta[:, None]).to(kind)

        out = tl.dot(scaled, s, input_precision=PREC) - z[:, None] * mean_v[None, :]
        out += _convolution(base + 2 * C, w_ptr, t, head * D + d, in_d, C, x_t, N, P, H, W, False, K, BLOCK_N, DP)
        if BIAS:
            bias = tl.load(b_ptr + head * D + d, mask=in_d, other=0.0).to(tl.float32)
            out += tl.where((t >= P)[:, None], bias[None, :], 0.0)
        g = tl.load(g_ptr + batch * g_b + t[:, None] * g_t + column, mask=mask, other=0.0).to(tl.float32)
        to = dx_ptr + (batch * N + t[:, None]) * (4 * C) + column
        tl.store(to + 3 * C, (g * out).to(kind), mask=mask)
        u = (g * tl.load(base + 3 * C + row + column, mask=mask, other=0.0).to(tl.float32)).to(kind)
        tl.store(u_ptr + (batch * N + t[:, None]) * C + column, u, mask=mask)

        us = tl.dot(u, tl.trans(s), input_precision=PREC)
        dz = -tl.sum(turned * us, axis=1) * inverse * inverse - tl.sum(u.to(tl.float32) * mean_v[None, :], axis=1)
        us_swapped = tl.dot(u, tl.trans(s_swapped), input_precision=PREC)
        dq = beta[:, None] * (us * cos + us_swapped * sin_swapped) + (dz * scale)[:, None] * mean_k[None, :]
        tl.store(to, (dq * _slope(raw, q)).to(kind), mask=mask)

        ds += tl.dot(tl.trans(scaled), u, input_precision=PREC)
        dv -= tl.sum(z[:, None] * u.to(tl.float32), axis=0)
        dk += tl.sum((dz * scale)[:, None] * q, axis=0)
    part = bh * chunks + chunk
    tl.store(ds_ptr + part * D * D + d[:, None] * D + d[None, :], ds, mask=square)
    tl.store(dk_ptr + part * D + d, dk, mask=in_d)
    tl.store(dv_ptr + part * D + d, dv, mask=in_d)


@triton.jit
def _key_grad_kernel(
    dx_ptr, u_ptr, ds_ptr, dk_ptr, dv_ptr, x_ptr, w_ptr, sin_ptr, cos_ptr,
    N, P, H, W, heads, C, factor, x_b, x_t,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, from those of the state and the means; factor = scale / N."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    in_d = d < D
    mask = (t < N)[:, None] & in_d[None, :]
    square = in_d[:, None] & in_d[None, :]
    kind = x_ptr.dtype.element_ty
    table = t[:, None] * D
    sin = tl.load(sin_ptr + table + d[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + table + d[None, :], mask=mask, other=0.0).to(tl.float32)
    sin_swapped = tl.load(sin_ptr + table + (d ^ 1)[None, :], mask=mask, other=0.0).to(tl.float32)
    column, swapped = (head * D + d)[None, :], (head * D + (d ^ 1))[None, :]
    base, row = x_ptr + batch * x_b, t[:, None] * x_t
    raw, k, turned = _turn(base + C, row + column, row + swapped, cos, sin, mask)
    v = tl.load(base + 2 * C + row + column, mask=mask, other=0.0)
    # the factor goes into the sums before they are rounded: they alone may be beyond float16
    at = ds_ptr + bh * D * D
    ds = (tl.load(at + d[:, None] * D + d[None, :], mask=square, other=0.0) * factor).to(kind)
    ds_swapped = (tl.load(at + (d ^ 1)[:, None] * D + d[None, :], mask=square, other=0.0) * factor).to(kind)

    dk = tl.dot(v, tl.trans(ds), input_precision=PREC) * cos
    dk += tl.dot(v, tl.trans(ds_swapped), input_precision=PREC) * sin_swapped
    dk += tl.load(dk_ptr + bh * D + d, mask=in_d, other=0.0)[None, :] / N
    to = dx_ptr + (batch * N + t[:, None]) * (4 * C) + column
    tl.store(to + C, (dk * _slope(raw, k)).to(kind), mask=mask)

    dv = tl.dot(turned.to(kind), ds, input_precision=PREC)
    dv += tl.load(dv_ptr + bh * D + d, mask=in_d, other=0.0)[None, :] / N
    u = u_ptr + batch * N * C
    dv += _convolution(u, w_ptr, t, head * D + d, in_d, C, C, N, P, H, W, True, K, BLOCK_N, DP)
    tl.store(to + 2 * C, dv.to(kind), mask=mask)


def _constants(D: int, dtype: torch.dtype) -> dict:
    # ieee: what the CUDA cores give; TF32 would cost float32 half of its digits
    return dict(D=D, DP=max(16, triton.next_power_of_2(D)), PREC="ieee" if dtype == torch.float32 else "tf32")


def _warps(D: int) -> int:
    return WARPS if D <= 64 else 8


class _Plan:
    """The launches of one shape; ``args`` are as :func:`launch` has them."""

    def __init__(self, x, weight, bias, heads: int, H: int, W: int):
        B, N, C = x.shape[0], x.shape[1], x.shape[2] // 4
        D = C // heads
        self.B, self.N, self.C, self.heads, self.D = B, N, C, heads, D
        self.P, self.scale, self.grid = N - H * W, D**-0.5, (H, W)
        self.chunks = 1 if N <= AT_ONCE else triton.cdiv(N, CHUNK)
        self.side = 3 if weight.shape[0] == 9 else 5
        self.bias = bias is not None
        self.strides = x.stride()[:2]
        self.constants, self.options = _constants(D, x.dtype), dict(num_warps=_warps(D))
        self.summed = CHUNK if self.chunks > 1 else triton.cdiv(N, BLOCK_N) * BLOCK_N
        self.tiles = (triton.cdiv(N, BLOCK_N), B * heads)
        sizes = (self.P, H, W)
        self.state = Launch(
            _state_kernel, (self.chunks, B * heads), (N, self.chunks, heads, C, self.scale, *self.strides),
            dict(LAST=self.chunks == 1, CHUNK=self.summed, BLOCK_N=BLOCK_N, **self.constants), **self.options,
        )  # fmt: skip
        self.finish_state = self._finish(self.scale / N, 1.0 / N)
        self.mix = Launch(
            _mix_kernel, self.tiles, (N, *sizes, heads, C, self.scale, *self.strides),
            dict(BIAS=self.bias, K=self.side, BLOCK_N=BLOCK_N, **self.constants), **self.options,
        )  # fmt: skip
        self._backward: dict[tuple, tuple] = {}

    def _finish(self, square: float, line: float) -> Launch:
        constants = {name: self.constants[name] for name in ("D", "DP")}
        return Launch(_finish_kernel, (self.B * self.heads,), (self.chunks, square, line), constants)

    def sums(self, device: torch.device, chunks: int = 1) -> list[torch.Tensor]:
        """Buffers of a square and two lines for every head (and chunk)."""
        rows = self.B * self.heads * chunks
        return [torch.empty(rows, n, dtype=torch.float32, device=device) for n in (self.D**2, self.D, self.D)]

    def backward(self, g: torch.Tensor) -> tuple[Launch, Launch, Launch]:
        key = (g.stride(), g.dtype)
        found = self._backward.get(key)
        if found is None:
            H, W = self.grid
            sizes, shared = (self.N, self.P, H, W), dict(K=self.side, BLOCK_N=BLOCK_N, **self.constants)
            queries = Launch(
                _query_grad_kernel, (self.chunks, self.B * self.heads),
                (*sizes, self.chunks, self.heads, self.C, self.scale, *self.strides, *g.stride()[:2]),
                dict(BIAS=self.bias, CHUNK=self.summed, **shared), num_warps=8,
            )  # fmt: skip
            keys = Launch(
                _key_grad_kernel, self.tiles,
                (*sizes, self.heads, self.C, self.scale / self.N, *self.strides), shared, **self.options,
            )  # fmt: skip
            found = self._backward[key] = (queries, self._finish(1.0, 1.0), keys)
        return found


_plans = Plans()


def _plan(x, weight, bias, sin, cos, heads: int, H: int, W: int) -> _Plan:
    key = (
        x.shape, x.stride(), x.dtype, weight.shape, weight.dtype, None if bias is None else bias.dtype, sin.dtype,
        cos.dtype, heads, H, W, x.device,
    )  # fmt: skip
    return _plans.get(key, lambda: _Plan(x, weight, bias, heads, H, W))


def launch(x, weight, bias, sin, cos, heads: int, H: int, W: int):
    """The forward kernels: the output (B, N, C), and what the gradient needs.

    Args:
        x: (B, N, 4 C), channels side by side: queries, keys, values, gate.
        weight, bias: (C, 9 or 25), (C) or None.
        sin, cos: (N, C / heads).
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, sin, cos = tap_major(weight), sin.contiguous(), cos.contiguous()
    with on_device(x):
        plan = _plan(x, weight, bias, sin, cos, heads, H, W)
        state = plan.sums(x.device)
        if plan.chunks == 1:
            plan.state(*state, x, sin, cos)
        else:
            parts = plan.sums(x.device, plan.chunks)
            plan.state(*parts, x, sin, cos)
            plan.finish_state(*state, *parts)
        y = torch.empty(plan.B, plan.N, plan.C, dtype=x.dtype, device=x.device)
        plan.mix(y, x, *state, weight, weight if bias is None else bias, sin, cos)
    return y, *state


def gradients(g, x, weight, bias, sin, cos, s, mean_k, mean_v, heads: int, H: int, W: int):
    """The gradient of x, and the sums (B, taps + 1, C) whose sum over B is that of the convolution."""
    x = x if x.stride(2) == 1 else x.contiguous()
    g = g if g.stride(2) == 1 else g.contiguous()
    weight, sin, cos = tap_major(weight), sin.contiguous(), cos.contiguous()
    with on_device(x):
        plan = _plan(x, weight, bias, sin, cos, heads, H, W)
        queries, finish, keys = plan.backward(g)
        dx = torch.empty(plan.B, plan.N, 4 * plan.C, dtype=x.dtype, device=x.device)
        u = torch.empty(plan.B, plan.N, plan.C, dtype=x.dtype, device=x.device)
        parts = plan.sums(x.device, plan.chunks)
        some_bias = weight if bias is None else bias
        queries(dx, u, *parts, g, x, s, mean_k, mean_v, weight, some_bias, sin, cos)
        sums = parts
        if plan.chunks > 1:
            sums = plan.sums(x.device)
            finish(*sums, *parts)
        keys(dx, u, *sums, x, weight, sin, cos)
        values = x[:, :, 2 * plan.C : 3 * plan.C]
        return dx, weight_sums(u, values, H, W, plan.P, plan.side)


def _of_convolution(sums: torch.Tensor, weight: torch.Tensor, bias_dtype: torch.dtype | None):
    sums = sums.sum(dim=0)
    taps = weight.shape[1]
    return sums[:taps].t().to(weight.dtype), None if bias_dtype is None else sums[taps].to(bias_dtype)


class MALAFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers would cost more than the kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, sin, cos, heads, H, W):
        y, *state = launch(x, weight, bias, sin, cos, heads, H, W)
        ctx.save_for_backward(x, weight, bias, sin, cos, *state)
        ctx.sizes = (heads, H, W)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        saved = ctx.saved_tensors
        dx, sums = gradients(g, *saved, *ctx.sizes)
        grads = _of_convolution(sums, saved[1], None if saved[2] is None else saved[2].dtype)
        return dx, *grads, None, None, None, None, None


@torch.library.custom_op("visionattn::mala_mix", mutates_args=())
def mala_mix_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sin: torch.Tensor,
    cos: torch.Tensor,
    heads: int,
    H: int,
    W: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch(x, weight, bias, sin, cos, heads, H, W)


@mala_mix_op.register_fake
def _(x, weight, bias, sin, cos, heads, H, W):
    C = x.shape[2] // 4
    D = C // heads
    state = [x.new_empty((x.shape[0] * heads, n), dtype=torch.float32) for n in (D * D, D, D)]
    return x.new_empty((x.shape[0], x.shape[1], C)), *state


@torch.library.custom_op("visionattn::mala_mix_grad", mutates_args=())
def mala_mix_grad_op(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sin: torch.Tensor,
    cos: torch.Tensor,
    s: torch.Tensor,
    mean_k: torch.Tensor,
    mean_v: torch.Tensor,
    heads: int,
    H: int,
    W: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients(g, x, weight, bias, sin, cos, s, mean_k, mean_v, heads, H, W)


@mala_mix_grad_op.register_fake
def _(g, x, weight, bias, sin, cos, s, mean_k, mean_v, heads, H, W):
    C = x.shape[2] // 4
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] + 1, C), dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, sin, cos, *sizes = inputs
    _, *state = output
    ctx.save_for_backward(x, weight, bias, sin, cos, *state)
    ctx.mark_non_differentiable(*state)
    ctx.sizes = sizes


def _backward(ctx, g, *unused):
    saved = ctx.saved_tensors
    dx, sums = mala_mix_grad_op(g, *saved, *ctx.sizes)
    grads = _of_convolution(sums, saved[1], None if saved[2] is None else saved[2].dtype)
    return dx, *grads, None, None, None, None, None


mala_mix_op.register_autograd(_backward, setup_context=_setup)

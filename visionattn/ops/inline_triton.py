"""Triton kernels of InLine attention with its local residual: nothing is permuted, the output is written once.

Forward, two launches: the covariance of keys and values, and one pass over the queries which adds the 3 x 3 convolution
of the values. Many tokens are summed in chunks (k^T v, k, v), and a third launch makes the covariance of them. The
gradient has the same shape: that of the covariance is a sum of q^T g, and one pass writes the gradients of q, k and v.
``visionattn::inline_mix`` is the operator.
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, Plans, on_device
from .depthwise_triton import _grad_w, _rows, tap_major, weight_sums

BLOCK_N = 64
WARPS = 4
CHUNK = 512
AT_ONCE = 1024  # tokens that one program sums without chunks


@triton.jit
def _moments_kernel(
    s_ptr, sa_ptr, sb_ptr, a_ptr, b_ptr,
    T, chunks, heads, scale,
    a_b, a_t, b_b, b_t,
    CENTER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """For one head and chunk: sum over tokens of a^T b (D, D), of a, of b; of one chunk, CENTER is as below."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    s = tl.zeros([DP, DP], tl.float32)
    sa = tl.zeros([DP], tl.float32)
    sb = tl.zeros([DP], tl.float32)
    for start in range(0, CHUNK, BLOCK_N):
        t = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
        mask = (t < T)[:, None] & (d < D)[None, :]
        a = tl.load(a_ptr + batch * a_b + t[:, None] * a_t + head * D + d[None, :], mask=mask, other=0.0)
        b = tl.load(b_ptr + batch * b_b + t[:, None] * b_t + head * D + d[None, :], mask=mask, other=0.0)
        s += tl.dot(tl.trans(a), b.to(a.dtype), input_precision=PREC)
        sa += tl.sum(a.to(tl.float32), axis=0)
        sb += tl.sum(b.to(tl.float32), axis=0)
    if CENTER:
        sa, sb = sa / T, sb / T
        s = scale * (s / T - sa[:, None] * sb[None, :])
    part = bh * chunks + chunk
    square = (d < D)[:, None] & (d < D)[None, :]
    tl.store(s_ptr + part * D * D + d[:, None] * D + d[None, :], s, mask=square)
    tl.store(sa_ptr + part * D + d, sa, mask=d < D)
    tl.store(sb_ptr + part * D + d, sb, mask=d < D)


@triton.jit
def _finish_kernel(
    m_ptr, ma_ptr, mb_ptr, s_ptr, sa_ptr, sb_ptr,
    T, chunks, scale,
    CENTER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Adds the chunks up; CENTER makes scale * covariance and the means of them."""
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
    if CENTER:
        sa, sb = sa / T, sb / T
        s = scale * (s / T - sa[:, None] * sb[None, :])
    tl.store(m_ptr + bh * D * D + d[:, None] * D + d[None, :], s, mask=square)
    tl.store(ma_ptr + bh * D + d, sa, mask=d < D)
    tl.store(mb_ptr + bh * D + d, sb, mask=d < D)


@triton.jit
def _local(
    v_ptr, w_ptr, t, channel, in_c, C, v_t, T, P, H, W,
    FLIP: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The 3 x 3 convolution of the values of one head at the tokens t, zero at prefix tokens."""
    n = t - P
    row, column = n // W, n % W
    acc = tl.zeros([BLOCK_N, DP], tl.float32)
    for tap in tl.static_range(9):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (n >= 0) & (t < T) & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        place = v_ptr + (t + dy * W + dx)[:, None] * v_t + channel[None, :]
        v = tl.load(place, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        w = tl.load(w_ptr + (8 - tap if FLIP else tap) * C + channel, mask=in_c, other=0.0).to(tl.float32)
        acc += v * w[None, :]
    return acc


@triton.jit
def _apply_kernel(
    y_ptr, q_ptr, v_ptr, m_ptr, mv_ptr, w_ptr, b_ptr,
    T, P, H, W, heads,
    q_b, q_t, v_b, v_t, w_b,
    BIAS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y = mean(v) + q m + conv(v) + b (b and the convolution on the grid's tokens alone)."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    in_d = d < D
    channel = head * D + d
    mask = (t < T)[:, None] & in_d[None, :]
    q = tl.load(q_ptr + batch * q_b + t[:, None] * q_t + channel[None, :], mask=mask, other=0.0)
    square = in_d[:, None] & in_d[None, :]
    m = tl.load(m_ptr + bh * D * D + d[:, None] * D + d[None, :], mask=square, other=0.0)
    mean = tl.load(mv_ptr + bh * D + d, mask=in_d, other=0.0)
    acc = tl.dot(q, m.to(q.dtype), input_precision=PREC) + mean[None, :]
    v, w, C = v_ptr + batch * v_b, w_ptr + batch * w_b, heads * D
    acc += _local(v, w, t, channel, in_d, C, v_t, T, P, H, W, False, BLOCK_N, DP)
    if BIAS:
        bias = tl.load(b_ptr + channel, mask=in_d, other=0.0).to(tl.float32)
        acc += tl.where((t >= P)[:, None], bias[None, :], 0.0)
    y = y_ptr + (batch * T + t[:, None]) * (heads * D) + channel[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grads_kernel(
    dq_ptr, dk_ptr, dv_ptr, g_ptr, k_ptr, v_ptr, m_ptr, mk_ptr, mv_ptr, dm_ptr, sg_ptr, w_ptr,
    T, P, H, W, heads, factor,
    g_b, g_t, k_b, k_t, v_b, v_t, w_b,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq = g m^T; dk = factor (v - mean v) dm^T; dv = factor (k - mean k) dm + sum(g) / T + the convolution's."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d = tl.arange(0, DP)
    in_d = d < D
    channel = head * D + d
    mask = (t < T)[:, None] & in_d[None, :]
    square = in_d[:, None] & in_d[None, :]
    at = bh * D * D + d[:, None] * D + d[None, :]
    to = (batch * T + t[:, None]) * (heads * D) + channel[None, :]
    kind = dq_ptr.dtype.element_ty

    g = tl.load(g_ptr + batch * g_b + t[:, None] * g_t + channel[None, :], mask=mask, other=0.0).to(kind)
    m = tl.load(m_ptr + at, mask=square, other=0.0)
    tl.store(dq_ptr + to, tl.dot(g, tl.trans(m).to(kind), input_precision=PREC).to(kind), mask=mask)

    # the factor goes into the centred values before they are rounded: dm alone may be beyond float16
    dm = tl.load(dm_ptr + at, mask=square, other=0.0) * factor
    mean_v = tl.load(mv_ptr + bh * D + d, mask=in_d, other=0.0)
    v = tl.load(v_ptr + batch * v_b + t[:, None] * v_t + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    v = tl.where(mask, v - mean_v[None, :], 0.0).to(kind)
    tl.store(dk_ptr + to, tl.dot(v, tl.trans(dm).to(kind), input_precision=PREC).to(kind), mask=mask)

    mean_k = tl.load(mk_ptr + bh * D + d, mask=in_d, other=0.0)
    k = tl.load(k_ptr + batch * k_b + t[:, None] * k_t + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    k = tl.where(mask, k - mean_k[None, :], 0.0).to(kind)
    dv = tl.dot(k, dm.to(kind), input_precision=PREC)
    dv += tl.load(sg_ptr + bh * D + d, mask=in_d, other=0.0)[None, :] / T
    at_g, w, C = g_ptr + batch * g_b, w_ptr + batch * w_b, heads * D
    dv += _local(at_g, w, t, channel, in_d, C, g_t, T, P, H, W, True, BLOCK_N, DP)
    tl.store(dv_ptr + to, dv.to(kind), mask=mask)


def _constants(D: int, dtype: torch.dtype) -> dict:
    # ieee: what the CUDA cores give; TF32 would cost float32 half of its digits
    return dict(D=D, DP=max(16, triton.next_power_of_2(D)), PREC="ieee" if dtype == torch.float32 else "tf32")


_plans = Plans()


def _moments(a, b, heads: int, scale: float, center: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over tokens of a^T b, a and b per head; centred: scale * covariance and the two means. All float32."""
    B, T, C = a.shape
    D = C // heads
    chunks = 1 if T <= AT_ONCE else triton.cdiv(T, CHUNK)
    key = ("moments", a.shape, a.stride(), b.stride(), heads, scale, center, a.dtype, b.dtype, a.device)

    def make() -> tuple[Launch, Launch | None]:
        constants = _constants(D, a.dtype)
        size = CHUNK if chunks > 1 else triton.cdiv(T, BLOCK_N) * BLOCK_N
        sums = Launch(
            _moments_kernel, (chunks, B * heads), (T, chunks, heads, scale, *a.stride()[:2], *b.stride()[:2]),
            dict(CENTER=center and chunks == 1, CHUNK=size, BLOCK_N=BLOCK_N, **constants),
        )  # fmt: skip
        constants.pop("PREC")
        constants["CENTER"] = center
        return sums, Launch(_finish_kernel, (B * heads,), (T, chunks, scale), constants) if chunks > 1 else None

    sums, finish = _plans.get(key, make)
    m, ma, mb = (torch.empty(B, heads, n, dtype=torch.float32, device=a.device) for n in (D * D, D, D))
    if finish is None:
        sums(m, ma, mb, a, b)
        return m, ma, mb
    parts = [torch.empty(B * heads * chunks, n, dtype=torch.float32, device=a.device) for n in (D * D, D, D)]
    sums(*parts, a, b)
    finish(m, ma, mb, *parts)
    return m, ma, mb


def launch(q, k, v, weight, bias, heads: int, H: int, W: int, P: int, scale: float):
    """The forward kernels, without the operator around them: the output, and what the gradient needs."""
    q, k, v, weight = _rows(q), _rows(k), _rows(v), tap_major(weight)
    B, T, C = q.shape
    key = (
        "apply", q.shape, q.stride(), v.stride(), weight.shape[0], heads, H, W, P, q.dtype, v.dtype, weight.dtype,
        None if bias is None else bias.dtype, q.device,
    )  # fmt: skip

    def make() -> Launch:
        numbers = (T, P, H, W, heads, *q.stride()[:2], *v.stride()[:2], 0 if weight.shape[0] == 1 else 9 * C)
        constants = dict(BIAS=bias is not None, BLOCK_N=BLOCK_N, **_constants(C // heads, q.dtype))
        tiles = (triton.cdiv(T, BLOCK_N), B * heads)
        return Launch(_apply_kernel, tiles, numbers, constants, num_warps=WARPS)

    with on_device(q):
        m, mk, mv = _moments(k, v, heads, scale, True)
        y = torch.empty(B, T, C, dtype=q.dtype, device=q.device)
        _plans.get(key, make)(y, q, v, m, mv, weight, weight if bias is None else bias)
    return y, m, mk, mv


def gradients(g, q, k, v, weight, m, mk, mv, heads: int, H: int, W: int, P: int, scale: float):
    """Gradients of q, k and v."""
    g, q, k, v, weight = _rows(g), _rows(q), _rows(k), _rows(v), tap_major(weight)
    B, T, C = q.shape
    key = (
        "grads", q.shape, g.stride(), k.stride(), v.stride(), weight.shape[0], heads, H, W, P, scale, q.dtype, g.dtype,
        k.dtype, v.dtype, weight.dtype, q.device,
    )  # fmt: skip

    def make() -> Launch:
        strides = (*g.stride()[:2], *k.stride()[:2], *v.stride()[:2], 0 if weight.shape[0] == 1 else 9 * C)
        constants = dict(BLOCK_N=BLOCK_N, **_constants(C // heads, q.dtype))
        numbers = (T, P, H, W, heads, scale / T, *strides)
        return Launch(_grads_kernel, (triton.cdiv(T, BLOCK_N), B * heads), numbers, constants)

    with on_device(q):
        dm, _, sg = _moments(q, g, heads, 1.0, False)
        dq, dk, dv = (torch.empty(B, T, C, dtype=q.dtype, device=q.device) for _ in range(3))
        _plans.get(key, make)(dq, dk, dv, g, k, v, m, mk, mv, dm, sg, weight)
    return dq, dk, dv


class InLineFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers would cost more than the kernels."""

    @staticmethod
    def forward(ctx, q, k, v, weight, bias, *sizes):
        y, m, mk, mv = launch(q, k, v, weight, bias, *sizes)
        ctx.save_for_backward(q, k, v, weight, m, mk, mv)
        ctx.sizes, ctx.bias_dtype = sizes, None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        grads = gradients(g, *ctx.saved_tensors, *ctx.sizes)
        return *grads, *_local_gradients(ctx, g, *ctx.saved_tensors[2:4], weight_sums), None, None, None, None, None


@torch.library.custom_op("visionattn::inline_mix", mutates_args=())
def inline_mix_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    H: int,
    W: int,
    P: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch(q, k, v, weight, bias, heads, H, W, P, scale)


@inline_mix_op.register_fake
def _(q, k, v, weight, bias, heads, H, W, P, scale):
    B, _, C = q.shape
    D = C // heads
    sums = [q.new_empty((B, heads, n), dtype=torch.float32) for n in (D * D, D, D)]
    return q.new_empty(q.shape), *sums


@torch.library.custom_op("visionattn::inline_mix_grad", mutates_args=())
def _grads(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    m: torch.Tensor,
    mk: torch.Tensor,
    mv: torch.Tensor,
    heads: int,
    H: int,
    W: int,
    P: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradients(g, q, k, v, weight, m, mk, mv, heads, H, W, P, scale)


@_grads.register_fake
def _(g, q, k, v, weight, m, mk, mv, heads, H, W, P, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, weight, bias, *sizes = inputs
    _, m, mk, mv = output
    ctx.save_for_backward(q, k, v, weight, m, mk, mv)
    ctx.mark_non_differentiable(m, mk, mv)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _local_gradients(ctx, g, v, weight, sums_of) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the convolution's kernels and bias."""
    _, H, W, P, _ = ctx.sizes
    if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
        return None, None
    sums = sums_of(g, v, H, W, P, 3)
    if weight.shape[0] == 1:
        sums = sums.sum(dim=0, keepdim=True)
    grad_b = None if ctx.bias_dtype is None else sums[:, 9].sum(dim=0).to(ctx.bias_dtype)
    return sums[:, :9].transpose(1, 2).to(weight.dtype), grad_b


def _backward(ctx, g, *unused):
    q, k, v, weight, m, mk, mv = ctx.saved_tensors
    grads = _grads(g, q, k, v, weight, m, mk, mv, *ctx.sizes)
    return *grads, *_local_gradients(ctx, g, v, weight, _grad_w), None, None, None, None, None


inline_mix_op.register_autograd(_backward, setup_context=_setup)

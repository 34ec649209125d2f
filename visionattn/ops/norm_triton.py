"""Triton kernels of what stands between the projections of a block: the residual sum, its layer norm, the cast."""

import torch
import triton
import triton.language as tl

from ._launch import Launch, Plans, on_device

_PER_PROGRAM = 2048  # elements


@triton.jit
def _norm_kernel(
    out_ptr, sum_ptr, x_ptr, y_ptr, w_ptr, b_ptr,
    rows, eps,
    ADD: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sum = x + y; out = layer norm of sum. Without ADD y and sum are not touched."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (row < rows)[:, None] & in_c[None, :]
    at = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    w = tl.load(w_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


_plans = Plans()


def _launch(rows: int, C: int, eps: float, add: bool) -> Launch:
    block = triton.next_power_of_2(C)
    per_program = max(1, _PER_PROGRAM // block)
    constants = dict(ADD=add, C=C, BLOCK_C=block, ROWS=per_program)
    return Launch(_norm_kernel, (triton.cdiv(rows, per_program),), (rows, eps), constants, num_warps=4)


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + y`` and its layer norm over the last axis in ``dtype``; without ``y``, ``x`` itself and its norm.

    Args:
        x, y: (..., C), contiguous; the sum has their promoted dtype.
        weight, bias: (C).
    """
    C = x.shape[-1]
    rows = x.numel() // C
    total = x if y is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    out = torch.empty_like(x, dtype=dtype)
    other = None if y is None else y.dtype
    key = (rows, C, eps, x.dtype, other, weight.dtype, bias.dtype, dtype, x.device)
    with on_device(x):
        launch = _plans.get(key, lambda: _launch(rows, C, eps, y is not None))
        launch(out, total, x, x if y is None else y, weight, bias)
    return total, out


@triton.jit
def _norm_grad_kernel(
    dx_ptr, dy_ptr, part_ptr, gs_ptr, gn_ptr, x_ptr, w_ptr,
    rows, eps, tiles,
    SUM: tl.constexpr, SECOND: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = gs (with SUM) + the gradient of x's norm, the same to dy (with SECOND); part: shares of the parameters'."""
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    w = tl.load(w_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    d_w = tl.zeros([BLOCK_C], tl.float32)
    d_b = tl.zeros([BLOCK_C], tl.float32)
    for i in range(tiles):
        row = ((tl.program_id(0) * tiles + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & in_c[None, :]
        at = row[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gn_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / C
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        unit = centred * rstd[:, None]
        d_w += tl.sum(g * unit, axis=0)
        d_b += tl.sum(g, axis=0)
        g *= w[None, :]
        along = tl.sum(g * unit, axis=1) / C
        dx = (g - (tl.sum(g, axis=1) / C)[:, None] - unit * along[:, None]) * rstd[:, None]
        if SUM:
            dx += tl.load(gs_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if SECOND:
            tl.store(dy_ptr + at, dx.to(dy_ptr.dtype.element_ty), mask=mask)
    part_ptr += tl.program_id(0) * 2 * C + c
    tl.store(part_ptr, d_w, mask=in_c)
    tl.store(part_ptr + C, d_b, mask=in_c)


def _grad_launch(rows: int, C: int, eps: float, total: bool, second: bool) -> tuple[Launch, int]:
    """The launch, and how many programs share the rows."""
    block = triton.next_power_of_2(C)
    per_tile = max(1, _PER_PROGRAM // block)
    tiles = triton.cdiv(triton.cdiv(rows, per_tile), 1024)
    programs = triton.cdiv(rows, per_tile * tiles)
    constants = dict(SUM=total, SECOND=second, C=C, BLOCK_C=block, ROWS=per_tile)
    return Launch(_norm_grad_kernel, (programs,), (rows, eps, tiles), constants, num_warps=4), programs


class AddNorm(torch.autograd.Function):
    """:func:`add_norm` with gradients; only the sum is kept, its mean and deviation are computed again."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps, dtype):
        total, out = add_norm(x, y, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if y is None else y.dtype)
        ctx.set_materialize_grads(False)
        return (total if y is not None else None), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gs, gn):
        x, weight, bias = ctx.saved_tensors
        first, second = ctx.dtypes
        if gn is None:
            return gs.to(first), None if second is None else gs.to(second), None, None, None, None
        gn = gn.contiguous()
        gs = None if gs is None else gs.contiguous()
        C = x.shape[-1]
        rows = x.numel() // C
        dx = torch.empty_like(x, dtype=first)
        dy = None if second is None else dx if second == first else torch.empty_like(x, dtype=second)
        apart = dy is not None and dy is not dx
        key = ("grad", rows, C, ctx.eps, first, second, gs is None, x.dtype, gn.dtype, weight.dtype, x.device)
        key = (*key, None if gs is None else gs.dtype)
        with on_device(x):
            launch, programs = _plans.get(key, lambda: _grad_launch(rows, C, ctx.eps, gs is not None, apart))
            part = torch.empty(programs, 2, C, dtype=torch.float32, device=x.device)
            launch(dx, dy if apart else dx, part, x if gs is None else gs, gn, x, weight)
        d_weight, d_bias = part.sum(dim=0).unbind()
        return dx, dy, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None

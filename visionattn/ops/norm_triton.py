"""A Triton kernel of what stands between the projections of a block: the residual sum, its layer norm, the cast."""

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

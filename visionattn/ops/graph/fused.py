"""The kernels as operators that autograd and torch.compile know: ``visionattn::graph_attention``."""

import torch
import triton
from torch import Tensor

from . import kernels

_LANES = 256  # heads times channels of one program; wider layers spread their heads over several


def _tiles(heads: int, dim: int) -> dict[str, int]:
    dp = triton.next_power_of_2(dim)
    hb = max(1, min(triton.next_power_of_2(heads), _LANES // dp))
    be = max(1, min(16, 2048 // (hb * dp)))
    return dict(HB=hb, DP=dp, BE=be, num_warps=4)


def _rows(x: Tensor) -> Tensor:
    """x (N, H, D), each node's heads and channels in one piece; q, k and v of one projection are, as they are."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@torch.library.custom_op("visionattn::graph_attention", mutates_args=())
def graph_attention_op(
    q: Tensor, k: Tensor, v: Tensor,
    in_start: Tensor, in_neighbour: Tensor, out_start: Tensor, out_neighbour: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (N, H, D) and denominators (N, H) float32, over edges sorted by destination (in) and by source (out)."""
    N, H, D = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty((N, H, D), dtype=v.dtype, device=v.device)
    den = torch.empty((N, H), dtype=torch.float32, device=v.device)
    tiles = _tiles(H, D)
    if N:
        kernels.forward_kernel[(N, triton.cdiv(H, tiles["HB"]))](
            q, k, v, in_start, in_neighbour, out, den, q.stride(0), k.stride(0), v.stride(0), H, D, D**-0.5, eps,
            **tiles,
        )  # fmt: skip
    return out, den


@graph_attention_op.register_fake
def _(q, k, v, in_start, in_neighbour, out_start, out_neighbour, eps):
    return v.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("visionattn::graph_attention_backward", mutates_args=())
def graph_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, den: Tensor,
    in_start: Tensor, in_neighbour: Tensor, out_start: Tensor, out_neighbour: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    N, H, D = q.shape
    q, k, v, grad = _rows(q), _rows(k), _rows(v), grad.contiguous()
    dq, dk, dv = (torch.empty((N, H, D), dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(den)
    tiles = _tiles(H, D)
    numbers = (q.stride(0), k.stride(0), v.stride(0), H, D, D**-0.5)
    if N:
        grid = (N, triton.cdiv(H, tiles["HB"]))
        kernels.query_kernel[grid](
            q, k, v, in_start, in_neighbour, out, den, grad, dq, delta, *numbers, **tiles
        )  # fmt: skip
        kernels.key_kernel[grid](q, k, v, out_start, out_neighbour, den, grad, delta, dk, dv, *numbers, **tiles)
    return dq, dk, dv


@graph_attention_backward_op.register_fake
def _(grad, q, k, v, out, den, in_start, in_neighbour, out_start, out_neighbour):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, in_start, in_neighbour, out_start, out_neighbour, _ = inputs
    ctx.save_for_backward(q, k, v, *output, in_start, in_neighbour, out_start, out_neighbour)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, out, den, *edges = ctx.saved_tensors
    return *torch.ops.visionattn.graph_attention_backward(grad, q, k, v, out, den, *edges), *[None] * 5


graph_attention_op.register_autograd(_backward, setup_context=_setup)

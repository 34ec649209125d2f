"""``torch.ops.visionattn.local_attention``: the kernels as an operator with a fake kernel and autograd.

A pattern travels as integers (patterns.encode), so that grids may be symbolic under ``torch.compile``.
"""

import torch

from . import fused
from .patterns import decode

_SETTINGS = "SymInt[] grid, int[] pattern, SymInt text, bool text_first, float scale"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, Tensor? bias, Tensor? lengths"


def _settings(grid, pattern, text, text_first, scale) -> tuple:
    return tuple(grid), decode(tuple(pattern)), text, text_first, scale


@torch.library.custom_op(
    "visionattn::local_attention", mutates_args=(), schema=f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)"
)
def local_attention_op(q, k, v, extra_k, extra_v, bias, lengths, grid, pattern, text, text_first, scale):
    return fused.forward(q, k, v, extra_k, extra_v, bias, lengths, *_settings(grid, pattern, text, text_first, scale))


@torch.library.custom_op(
    "visionattn::local_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def local_attention_backward_op(
    grad, grad_lse, q, k, v, extra_k, extra_v, bias, lengths, out, lse, grid, pattern, text, text_first, scale
):
    grads = fused.backward(
        grad, grad_lse, q, k, v, extra_k, extra_v, bias, lengths, out, lse,
        *_settings(grid, pattern, text, text_first, scale),
    )  # fmt: skip
    return tuple(q.new_empty(0) if g is None else g for g in grads)


@local_attention_op.register_fake
def _(q, k, v, extra_k, extra_v, bias, lengths, grid, pattern, text, text_first, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@local_attention_backward_op.register_fake
def _(grad, grad_lse, q, k, v, extra_k, extra_v, bias, lengths, out, lse, *settings):
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, extra_k, extra_v, bias))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.settings = inputs[7:]


def _backward(ctx, grad, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 12
    if grad is None:
        grad = torch.zeros_like(out)
    grads = torch.ops.visionattn.local_attention_backward(grad, grad_lse, *tensors, out, lse, *ctx.settings)
    present = [g if t is not None else None for g, t in zip(grads, tensors, strict=False)]
    return (*present, None, None, None, None, None, None)


local_attention_op.register_autograd(_backward, setup_context=_setup)


class LocalFunction(torch.autograd.Function):
    """The operator for eager mode, where the dispatcher's Python layers would cost more than small kernels."""

    @staticmethod
    def forward(ctx, q, k, v, extra_k, extra_v, bias, lengths, settings):
        ctx.set_materialize_grads(False)
        out, lse = fused.forward(q, k, v, extra_k, extra_v, bias, lengths, *settings)
        ctx.save_for_backward(q, k, v, extra_k, extra_v, bias, lengths, out, lse)
        ctx.settings = settings
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 8
        if grad is None:
            grad = torch.zeros_like(out)
        return (*fused.backward(grad, grad_lse, *tensors, out, lse, *ctx.settings), None, None)

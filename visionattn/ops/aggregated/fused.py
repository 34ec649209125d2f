"""Launches the Triton kernels of aggregated attention, and registers them as operators with gradients."""

import contextlib
from dataclasses import dataclass

import torch
import triton

from . import kernels

TENSORS = 9  # q, kv, kv_pool, query_embedding, tau, bias_local, bias_pool, tokens, token_bias


def _pad(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


@dataclass(frozen=True)
class Tiles:
    """Tokens and pooled keys of a tile, and warps."""

    tokens: int = 64
    pooled: int = 64
    warps: int = 4


class _Problem:
    """Sizes, strides and constants of a call."""

    def __init__(self, q, kv, kv_pool, height: int, width: int, window: int, tiles: Tiles):
        self.B, self.N, self.heads, self.dim = q.shape
        self.P, self.H, self.W, self.window = kv_pool.shape[1], height, width, window
        self.per_pair = triton.cdiv(self.N, tiles.tokens)
        self.tiles_p = triton.cdiv(self.P, tiles.pooled)
        self.strides_q = q.stride()[:3]
        self.strides_kv, self.strides_pool = kv.stride()[:4], kv_pool.stride()[:4]
        precision = "ieee"
        if q.dtype == torch.float32:
            precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.LP, self.DP = _pad(window * window), _pad(self.dim)
        self.base = dict(D=self.dim, DP=self.DP, WIN=window, BM=tiles.tokens, num_warps=tiles.warps)
        self.pooled = dict(self.base, BK=min(tiles.pooled, _pad(self.P)), PREC=precision)
        self.full = dict(self.pooled, LP=self.LP)
        self.sizes = (self.N, self.P, self.H, self.W, self.heads)


def _on(q):
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _ready(*tensors) -> list[torch.Tensor]:
    """Channels next to each other in the first three tensors, everything so in the others."""
    head = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3]]
    return head + [x.contiguous() for x in tensors[3:]]


def forward(*args, tiles: Tiles | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, N, heads, D) and log-sum-exp (B, heads, N; base 2)."""
    tensors, sizes = _ready(*args[:TENSORS]), args[TENSORS:]
    q = tensors[0]
    p = _Problem(*tensors[:3], *sizes, tiles or Tiles())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((p.B, p.heads, p.N), dtype=torch.float32, device=q.device)
    if out.numel():
        with _on(q):
            kernels.forward[(p.B * p.heads * p.per_pair,)](
                *tensors, out, lse, *p.strides_q, *p.strides_kv, *p.strides_pool, *p.sizes, p.per_pair, **p.full
            )
    return out, lse


def backward(grad, *args, tiles: Tiles | None = None) -> tuple[torch.Tensor, ...]:
    """Gradients of the nine tensors; those of parameters and of the pooled bias in float32."""
    tensors, (out, lse), sizes = _ready(*args[:TENSORS]), args[TENSORS : TENSORS + 2], args[TENSORS + 2 :]
    q, kv, kv_pool, embedding, tau, bias_local, bias_pool, tokens, token_bias = tensors
    tiles = tiles or Tiles()
    p = _Problem(q, kv, kv_pool, *sizes, tiles)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    strides_grad = grad.stride()[:3]

    def buffer(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    pairs, L = p.B * p.heads, p.window**2
    per_chunk = max(1, min(8, pairs * p.per_pair // 2048))
    chunks = triton.cdiv(p.per_pair, per_chunk)
    delta = buffer(p.B, p.heads, p.N)
    dq = buffer(*q.shape, dtype=q.dtype)
    dkv = buffer(*kv.shape, dtype=kv.dtype)
    d_tokens, d_token_bias = buffer(p.B, p.heads, chunks, p.DP, p.LP), buffer(p.B, p.heads, chunks, p.LP)
    d_local, d_embedding = buffer(p.B, p.heads, chunks, p.LP), buffer(p.B, p.heads, chunks, p.DP)
    d_tau = buffer(p.B, p.heads, chunks)
    d_pool = buffer(chunks, *kv_pool.shape)
    per_images = max(1, p.B * p.heads * p.per_pair * p.tiles_p // 1024)
    image_chunks = triton.cdiv(p.B, per_images)
    d_bias = buffer(image_chunks, p.heads, p.N, p.P)
    with _on(q):
        kernels.query_grad[(pairs * chunks,)](
            *tensors, out, lse, grad, delta, dq, d_tokens, d_token_bias, d_local, d_embedding, d_tau,
            *p.strides_q, *p.strides_kv, *p.strides_pool, *strides_grad, *p.sizes, chunks, per_chunk, **p.full,
        )  # fmt: skip
        kernels.key_grad[(pairs * p.per_pair,)](
            q, kv, embedding, tau, bias_local, tokens, token_bias, lse, grad, delta, dkv,
            *p.strides_q, *p.strides_kv, *strides_grad, *p.sizes, p.per_pair, **p.base,
        )  # fmt: skip
        pooled = (q, kv_pool, embedding, tau, bias_pool, lse, grad, delta)
        strides = (*p.strides_q, *p.strides_pool, *strides_grad)
        kernels.pool_grad[(pairs * p.tiles_p * chunks,)](
            *pooled, d_pool, *strides, *p.sizes, chunks, per_chunk, p.tiles_p, **p.pooled
        )
        kernels.bias_grad[(image_chunks * p.heads * p.tiles_p * p.per_pair,)](
            *pooled, d_bias, *strides, *p.sizes, p.B, per_images, p.per_pair, p.tiles_p, **p.pooled
        )
    d_pool = d_pool.sum(0)
    keys = kv_pool[:, :, 0].float()
    inverse = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
    unit, d_keys = keys * inverse, d_pool[:, :, 0]
    d_keys = (d_keys - unit * (d_keys * unit).sum(-1, keepdim=True)) * inverse
    d_pool = torch.stack([d_keys, d_pool[:, :, 1]], dim=2).to(kv_pool.dtype)
    return (
        dq,
        dkv,
        d_pool,
        d_embedding.sum((0, 2))[:, : p.dim],
        d_tau.sum((0, 2)),
        d_local.sum((0, 2))[:, :L],
        d_bias.sum(0),
        d_tokens.sum((0, 2))[:, : p.dim, :L],
        d_token_bias.sum((0, 2))[:, :L],
    )


_SIZES = "int height, int width, int window"
_INPUTS = (
    "Tensor q, Tensor kv, Tensor kv_pool, Tensor query_embedding, Tensor tau, Tensor bias_local, Tensor bias_pool, "
    "Tensor tokens, Tensor token_bias"
)


@torch.library.custom_op(
    "visionattn::aggregated_attention", mutates_args=(), schema=f"({_INPUTS}, {_SIZES}) -> (Tensor, Tensor)"
)
def aggregated_attention_op(*args):
    return forward(*args)


@torch.library.custom_op(
    "visionattn::aggregated_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_SIZES}) -> ({', '.join(['Tensor'] * TENSORS)})",
)
def aggregated_attention_backward_op(*args):
    return tuple(x.contiguous() for x in backward(*args))


@aggregated_attention_op.register_fake
def _(q, *args):
    B, N, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, heads, N, dtype=torch.float32)


@aggregated_attention_backward_op.register_fake
def _(grad, *args):
    data, params = args[:3], args[3:TENSORS]
    return (*(x.new_empty(x.shape) for x in data), *(x.new_empty(x.shape, dtype=torch.float32) for x in params))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.sizes = inputs[TENSORS:]


def _backward(ctx, grad, _):
    saved = ctx.saved_tensors
    grads = torch.ops.visionattn.aggregated_attention_backward(grad, *saved, *ctx.sizes)
    return *(g.to(x.dtype) for g, x in zip(grads, saved[:TENSORS], strict=True)), None, None, None


aggregated_attention_op.register_autograd(_backward, setup_context=_setup)

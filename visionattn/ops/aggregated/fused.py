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
    """Tokens and pooled keys of a tile, warps, pipeline stages."""

    tokens: int = 64
    pooled: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """Tiles of the kernels: forward, query_grad, key_grad, pool_grad, bias_grad."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    pool: Tiles
    bias: Tiles


def pick_tiles(dim: int, dtype: torch.dtype) -> Plan:
    row = _pad(dim) * dtype.itemsize  # bytes
    if row <= 64:
        return Plan(*[Tiles(64, 64, 4, 2)] * 5)
    if row <= 128:
        return Plan(*[Tiles(64, 32, 4, 1)] * 5)
    return Plan(*[Tiles(32, 16, 4, 1)] * 5)


class _Problem:
    """Sizes, strides and constants of a call."""

    def __init__(self, q, kv, kv_pool, height: int, width: int, window: int):
        self.B, self.N, self.heads, self.dim = q.shape
        self.P, self.pairs, self.window = kv_pool.shape[1], self.B * self.heads, window
        self.LP, self.DP = _pad(window * window), _pad(self.dim)
        self.sizes = (self.N, self.P, height, width, self.heads)
        self.strides_q = q.stride()[:3]
        self.strides_kv, self.strides_pool = kv.stride()[:4], kv_pool.stride()[:4]
        self.precision = "ieee"
        if q.dtype == torch.float32:
            self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

    def constants(self, tiles: Tiles, pooled: bool = True, local: bool = True) -> dict:
        out = dict(D=self.dim, DP=self.DP, WIN=self.window, BM=tiles.tokens)
        if pooled:
            out |= dict(BK=min(tiles.pooled, _pad(self.P)), PREC=self.precision)
        if pooled and local:
            out["LP"] = self.LP
        return dict(out, num_warps=tiles.warps, num_stages=tiles.stages)

    def per_pair(self, tiles: Tiles) -> int:
        """Tiles of tokens of one (image, head)."""
        return triton.cdiv(self.N, tiles.tokens)

    def chunks(self, tiles: Tiles, parallel: int = 1) -> tuple[int, int]:
        """Programs that share the tiles of one (image, head), and how many each takes: enough for the device."""
        each = max(1, min(8, self.pairs * parallel * self.per_pair(tiles) // 2048))
        return triton.cdiv(self.per_pair(tiles), each), each


def _on(q):
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _ready(*tensors) -> list[torch.Tensor]:
    """Channels next to each other in the first three tensors, everything so in the others."""
    head = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3]]
    return head + [x.contiguous() for x in tensors[3:]]


def forward(*args, tiles: Plan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, N, heads, D) and log-sum-exp (B, heads, N; base 2)."""
    tensors, sizes = _ready(*args[:TENSORS]), args[TENSORS:]
    q = tensors[0]
    p = _Problem(*tensors[:3], *sizes)
    chosen = (tiles or pick_tiles(p.dim, q.dtype)).forward
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((p.B, p.heads, p.N), dtype=torch.float32, device=q.device)
    if out.numel():
        per_pair = p.per_pair(chosen)
        with _on(q):
            kernels.forward[(p.pairs * per_pair,)](
                *tensors, out, lse, *p.strides_q, *p.strides_kv, *p.strides_pool, *p.sizes, per_pair,
                **p.constants(chosen),
            )  # fmt: skip
    return out, lse


def backward(grad, *args, tiles: Plan | None = None) -> tuple[torch.Tensor, ...]:
    """Gradients of the nine tensors; those of parameters and of the pooled bias in float32."""
    tensors, (out, lse), sizes = _ready(*args[:TENSORS]), args[TENSORS : TENSORS + 2], args[TENSORS + 2 :]
    q, kv, kv_pool, embedding, tau, bias_local, _, tokens, token_bias = tensors
    p = _Problem(q, kv, kv_pool, *sizes)
    tiles = tiles or pick_tiles(p.dim, q.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    strides_grad = grad.stride()[:3]
    delta = torch.empty((p.B, p.heads, p.N), dtype=torch.float32, device=q.device)
    with _on(q):
        dq, *params = _query_grad(p, tiles.queries, tensors, out, lse, grad, delta)
        dkv = torch.empty(kv.shape, dtype=kv.dtype, device=q.device)
        per_pair = p.per_pair(tiles.keys)
        kernels.key_grad[(p.pairs * per_pair,)](
            q, kv, embedding, tau, bias_local, tokens, token_bias, lse, grad, delta, dkv,
            *p.strides_q, *p.strides_kv, *strides_grad, *p.sizes, per_pair, **p.constants(tiles.keys, pooled=False),
        )  # fmt: skip
        d_pool, d_bias = _pool_grads(p, tiles, tensors, lse, grad, delta)
    d_embedding, d_tau, d_local, d_tokens, d_token_bias = params
    return dq, dkv, d_pool, d_embedding, d_tau, d_local, d_bias, d_tokens, d_token_bias


def _query_grad(p: _Problem, tiles: Tiles, tensors, out, lse, grad, delta) -> tuple[torch.Tensor, ...]:
    """Gradients of q and of the parameters; fills delta."""
    q = tensors[0]
    chunks, each = p.chunks(tiles)

    def partial(*shape):
        return torch.empty((p.B, p.heads, chunks, *shape), dtype=torch.float32, device=q.device)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_tokens, d_token_bias, d_local = partial(p.DP, p.LP), partial(p.LP), partial(p.LP)
    d_embedding, d_tau = partial(p.DP), partial()
    kernels.query_grad[(p.pairs * chunks,)](
        *tensors, out, lse, grad, delta, dq, d_tokens, d_token_bias, d_local, d_embedding, d_tau,
        *p.strides_q, *p.strides_kv, *p.strides_pool, *grad.stride()[:3], *p.sizes, chunks, each,
        **p.constants(tiles),
    )  # fmt: skip
    L = p.window**2
    return (
        dq,
        d_embedding.sum((0, 2))[:, : p.dim],
        d_tau.sum((0, 2)),
        d_local.sum((0, 2))[:, :L],
        d_tokens.sum((0, 2))[:, : p.dim, :L],
        d_token_bias.sum((0, 2))[:, :L],
    )


def _pool_grads(p: _Problem, tiles: Plan, tensors, lse, grad, delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the pooled keys and values, and of their bias."""
    q, _, kv_pool, embedding, tau, _, bias_pool, _, _ = tensors
    args = (q, kv_pool, embedding, tau, bias_pool, lse, grad, delta)
    strides = (*p.strides_q, *p.strides_pool, *grad.stride()[:3])

    tiles_p = triton.cdiv(p.P, tiles.pool.pooled)
    chunks, each = p.chunks(tiles.pool, tiles_p)
    d_pool = torch.empty((chunks, *kv_pool.shape), dtype=torch.float32, device=q.device)
    kernels.pool_grad[(p.pairs * tiles_p * chunks,)](
        *args, d_pool, *strides, *p.sizes, chunks, each, tiles_p, **p.constants(tiles.pool, local=False)
    )
    tiles_p, per_pair = triton.cdiv(p.P, tiles.bias.pooled), p.per_pair(tiles.bias)
    each = max(1, p.pairs * per_pair * tiles_p // 1024)
    chunks = triton.cdiv(p.B, each)
    d_bias = torch.empty((chunks, *bias_pool.shape), dtype=torch.float32, device=q.device)
    kernels.bias_grad[(chunks * p.heads * tiles_p * per_pair,)](
        *args, d_bias, *strides, *p.sizes, p.B, each, per_pair, tiles_p, **p.constants(tiles.bias, local=False)
    )
    d_pool = d_pool.sum(0)
    keys = kv_pool[:, :, 0].float()
    inverse = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
    unit, d_keys = keys * inverse, d_pool[:, :, 0]
    d_keys = (d_keys - unit * (d_keys * unit).sum(-1, keepdim=True)) * inverse
    return torch.stack([d_keys, d_pool[:, :, 1]], dim=2).to(kv_pool.dtype), d_bias.sum(0)


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

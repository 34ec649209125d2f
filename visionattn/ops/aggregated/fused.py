"""Launches the Triton kernels of aggregated attention, and registers them as operators with gradients."""

import math
from dataclasses import dataclass

import torch
import triton

from visionattn.ops._launch import Launch, Plans, on_device

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

    def __init__(self, tensors, height: int, width: int, window: int):
        q, kv, kv_pool = tensors[:3]
        self.B, self.N, self.heads, self.dim = q.shape
        self.P, self.pairs, self.window = kv_pool.shape[1], self.B * self.heads, window
        self.LP, self.DP = _pad(window * window), _pad(self.dim)
        self.sizes = (self.N, self.P, height, width, self.heads)
        self.strides_q = q.stride()[:3]
        self.strides_kv, self.strides_pool = kv.stride()[:4], kv_pool.stride()[:4]
        self.precision = "ieee"
        if q.dtype == torch.float32:
            self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        strides = (self.strides_q, self.strides_kv, self.strides_pool)
        self.key = (q.shape, self.sizes, window, strides, self.precision, q.device, *(t.dtype for t in tensors))

    def constants(self, tiles: Tiles, pooled: bool = True, local: bool = True) -> dict:
        out = dict(D=self.dim, DP=self.DP, WIN=self.window, BM=tiles.tokens)
        if pooled:
            out |= dict(BK=min(tiles.pooled, _pad(self.P)), PREC=self.precision)
        if pooled and local:
            out["LP"] = self.LP
        return out

    def per_pair(self, tiles: Tiles) -> int:
        """Tiles of tokens of one (image, head)."""
        return triton.cdiv(self.N, tiles.tokens)

    def chunks(self, tiles: Tiles, parallel: int = 1) -> tuple[int, int]:
        """Programs that share the tiles of one (image, head), and how many each takes: enough for the device."""
        each = max(1, min(8, self.pairs * parallel * self.per_pair(tiles) // 2048))
        return triton.cdiv(self.per_pair(tiles), each), each

    def launch(self, kernel, tensors, tiles: Tiles, programs: int, strides: tuple, numbers: tuple, **constants) -> None:
        def make() -> Launch:
            unit = math.gcd(16 // tensors[0].element_size(), *strides)  # a load takes at most 16 bytes
            values = (*(s // unit for s in strides), *numbers)
            named = dict(constants, UNIT=unit)
            return Launch(kernel, (programs,), values, named, num_warps=tiles.warps, num_stages=tiles.stages)

        _plans.get((kernel, tiles, self.key, strides), make)(*tensors)


_plans = Plans()


def _ready(*tensors) -> list[torch.Tensor]:
    """Channels next to each other in the first three tensors, everything so in the others."""
    head = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3]]
    return head + [x.contiguous() for x in tensors[3:]]


def forward(*args, tiles: Plan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, N, heads, D) and log-sum-exp (B, heads, N; base 2)."""
    tensors, sizes = _ready(*args[:TENSORS]), args[TENSORS:]
    q = tensors[0]
    p = _Problem(tensors, *sizes)
    chosen = (tiles or pick_tiles(p.dim, q.dtype)).forward
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((p.B, p.heads, p.N), dtype=torch.float32, device=q.device)
    if out.numel():
        per_pair = p.per_pair(chosen)
        strides = (*p.strides_q, *p.strides_kv, *p.strides_pool)
        with on_device(q):
            used, numbers = (*tensors, out, lse), (*p.sizes, per_pair)
            p.launch(kernels.forward, used, chosen, p.pairs * per_pair, strides, numbers, **p.constants(chosen))
    return out, lse


def backward(grad, *args, tiles: Plan | None = None) -> tuple[torch.Tensor, ...]:
    """Gradients of the nine tensors; those of parameters and of the pooled bias in float32."""
    tensors, (out, lse), sizes = _ready(*args[:TENSORS]), args[TENSORS : TENSORS + 2], args[TENSORS + 2 :]
    q, kv, _, embedding, tau, bias_local, _, tokens, token_bias = tensors
    p = _Problem(tensors, *sizes)
    tiles = tiles or pick_tiles(p.dim, q.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.empty((p.B, p.heads, p.N), dtype=torch.float32, device=q.device)
    with on_device(q):
        dq, *params = _query_grad(p, tiles.queries, tensors, out, lse, grad, delta)
        dkv = torch.empty(kv.shape, dtype=kv.dtype, device=q.device)
        per_pair = p.per_pair(tiles.keys)
        used = (q, kv, embedding, tau, bias_local, tokens, token_bias, lse, grad, delta, dkv)
        strides, numbers = (*p.strides_q, *p.strides_kv, *grad.stride()[:3]), (*p.sizes, per_pair)
        constants = p.constants(tiles.keys, pooled=False)
        p.launch(kernels.key_grad, used, tiles.keys, p.pairs * per_pair, strides, numbers, **constants)
        d_pool, d_bias = _pool_grads(p, tiles, tensors, lse, grad, delta)
    d_embedding, d_tau, d_local, d_tokens, d_token_bias = params
    return dq, dkv, d_pool, d_embedding, d_tau, d_local, d_bias, d_tokens, d_token_bias


def _query_grad(p: _Problem, tiles: Tiles, tensors, out, lse, grad, delta) -> tuple[torch.Tensor, ...]:
    """Gradients of q and of the parameters; fills delta."""
    q = tensors[0]
    chunks, each = p.chunks(tiles)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    widths = (p.DP * p.LP, p.LP, p.LP, p.DP, 1)  # learned tokens, their bias, local bias, query embedding, tau
    part = torch.empty((p.B, p.heads, chunks, sum(widths)), dtype=torch.float32, device=q.device)
    strides = (*p.strides_q, *p.strides_kv, *p.strides_pool, *grad.stride()[:3])
    used = (*tensors, out, lse, grad, delta, dq, part)
    numbers = (*p.sizes, chunks, each)
    p.launch(kernels.query_grad, used, tiles, p.pairs * chunks, strides, numbers, **p.constants(tiles))
    L = p.window**2
    d_tokens, d_token_bias, d_local, d_embedding, d_tau = part.sum((0, 2)).split(widths, dim=1)
    d_tokens = d_tokens.view(p.heads, p.DP, p.LP)[:, : p.dim, :L]
    return dq, d_embedding[:, : p.dim], d_tau[:, 0], d_local[:, :L], d_tokens, d_token_bias[:, :L]


def _pool_grads(p: _Problem, tiles: Plan, tensors, lse, grad, delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the pooled keys and values, and of their bias."""
    q, _, kv_pool, embedding, tau, _, bias_pool, _, _ = tensors
    args = (q, kv_pool, embedding, tau, bias_pool, lse, grad, delta)
    strides = (*p.strides_q, *p.strides_pool, *grad.stride()[:3])

    tiles_p = triton.cdiv(p.P, tiles.pool.pooled)
    chunks, each = p.chunks(tiles.pool, tiles_p)
    part = torch.empty((chunks, *kv_pool.shape), dtype=torch.float32, device=q.device)
    numbers = (*p.sizes, chunks, each, tiles_p)
    constants = p.constants(tiles.pool, local=False)
    programs = p.pairs * tiles_p * chunks
    p.launch(kernels.pool_grad, (*args, part), tiles.pool, programs, strides, numbers, **constants)
    d_pool = torch.empty(kv_pool.shape, dtype=kv_pool.dtype, device=q.device)
    constants = {name: constants[name] for name in ("D", "DP", "BK")}
    used, numbers = (kv_pool, part, d_pool), (p.B, p.P, p.heads, chunks, tiles_p)
    p.launch(kernels.pool_sum, used, tiles.pool, p.pairs * tiles_p, p.strides_pool, numbers, **constants)

    tiles_p, per_pair = triton.cdiv(p.P, tiles.bias.pooled), p.per_pair(tiles.bias)
    each = max(1, p.pairs * per_pair * tiles_p // 1024)
    chunks = triton.cdiv(p.B, each)
    d_bias = torch.empty((chunks, *bias_pool.shape), dtype=torch.float32, device=q.device)
    numbers = (*p.sizes, p.B, each, per_pair, tiles_p)
    constants = p.constants(tiles.bias, local=False)
    programs = chunks * p.heads * tiles_p * per_pair
    p.launch(kernels.bias_grad, (*args, d_bias), tiles.bias, programs, strides, numbers, **constants)
    return d_pool, d_bias.sum(0)


class AggregatedFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers cost more than small kernels."""

    @staticmethod
    def forward(ctx, *args):
        out, lse = forward(*args)
        ctx.save_for_backward(*args[:TENSORS], out, lse)
        ctx.sizes = args[TENSORS:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        grads = backward(grad, *saved, *ctx.sizes)
        return *(g.to(x.dtype) for g, x in zip(grads, saved[:TENSORS], strict=True)), None, None, None


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

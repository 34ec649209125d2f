"""Softmax attention, fused or not: the map is recomputed from the queries and keys that the product was given."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.layers.moh import MoHAttention
from visionattn.layers.stripes import pad_to, stripe_shape, stripes
from visionattn.layers.transnext import AggregatedAttention, CosineAttention
from visionattn.layers.window import SpatialReductionAttention, StripeAttention
from visionattn.ops.aggregated.reference import window_validity
from visionattn.ops.depthwise import depthwise_residual

from .registry import Call, Product, register_map
from .result import Explanation, Segment
from .windows import partition, place


def softmax_rows(q: torch.Tensor, k: torch.Tensor, scale: float, bias: torch.Tensor | None = None):
    """Rows of ``softmax(scale q k^T + bias)``: q (B, H, N, D), k (B, H, M, D), bias broadcast over (B, H, N, M)."""
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[-2], k.shape[-2])

    def rows(i: torch.Tensor) -> torch.Tensor:
        logits = (q[:, :, i] * scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[..., i, :]
        return logits.softmax(dim=-1)

    return rows


def explain_product(product: Product, dtype: torch.dtype) -> Explanation:
    """A product that was seen, as an explanation whose sequences are not placed yet: ``'tokens'``.

    (B, heads, N, D) is what it says; three axes have no heads; of more axes nothing is known, all lead as one batch.
    """
    v = _four(product.values).to(dtype)
    if product.weights is not None:
        weights = _four(product.weights)
        return _tokens(lambda i: weights[:, :, i].to(dtype), weights.shape, v)
    q, k, bias = _four(product.q).to(dtype), _four(product.k).to(dtype), product.mask
    if k.shape[1] != q.shape[1]:  # grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if product.causal:
        bias = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=dtype, device=q.device).masked_fill(~bias, float("-inf"))
        if product.q.ndim != 4:
            bias = _four(bias.expand(*product.q.shape[:-1], k.shape[-2]))
        bias = bias.to(dtype)
    scale = q.shape[-1] ** -0.5 if product.scale is None else product.scale
    return _tokens(softmax_rows(q, k, scale, bias), (*q.shape[:3], k.shape[2]), v)


def _four(t: torch.Tensor) -> torch.Tensor:
    return t if t.ndim == 4 else t.flatten(0, -3).unsqueeze(1)


def _tokens(rows, shape, values: torch.Tensor) -> Explanation:
    batch, heads, n, m = shape
    queries, keys = (Segment("tokens", (n,)),), (Segment("tokens", (m,)),)
    return Explanation("softmax", rows, heads, batch, queries, keys, values)


def explain_softmax(product: Product, call: Call) -> Explanation:
    """A product in a module without an explainer (timm's): windows are placed, else a grid is found that fits."""
    found = explain_product(product, call.dtype)
    n, m = found.queries[0].size, found.keys[0].size
    placement = call.placement
    if placement is not None and placement.index.shape[1] == n == m and found.batch % len(placement.index) == 0:
        return place(found, placement)
    if not _tokens_of(call) & {n, m}:
        return found  # windows, channels: nothing says where
    if found.heads == 1 and found.batch != call.batch and found.batch % call.batch == 0:
        found = _split_heads(found, call.batch)
    if found.batch != call.batch:
        return found
    queries, keys = locate(n, call), locate(m, call)
    if keys is not None and m < n:
        keys = tuple(Segment("pooled", s.shape) if s.name == "grid" else s for s in keys)
    return replace(found, queries=queries or found.queries, keys=keys or found.keys)


def _split_heads(found: Explanation, batch: int) -> Explanation:
    """Heads that lie in the batch, as three axes have them."""
    heads = found.batch // batch

    def rows(i: torch.Tensor) -> torch.Tensor:
        return found.rows(i).squeeze(1).unflatten(0, (batch, heads))

    values = found.values.squeeze(1).unflatten(0, (batch, heads))
    return replace(found, rows=rows, heads=heads, batch=batch, values=values)


def _tokens_of(call: Call) -> set[int]:
    """Numbers of tokens that the layer's input may have: (B, N, C), or a map with its channels first or last."""
    x = call.args[0] if call.args and isinstance(call.args[0], torch.Tensor) else None
    if x is None or x.ndim not in (3, 4) or x.shape[0] != call.batch:
        return set()
    return {x.shape[1]} if x.ndim == 3 else {x.shape[2] * x.shape[3], x.shape[1] * x.shape[2]}


def locate(n: int, call: Call) -> tuple[Segment, ...] | None:
    """Segments of n tokens, from the layer's input if that is a map, else from the image and a whole stride; None where
    nothing fits."""
    x = call.args[0] if call.args and isinstance(call.args[0], torch.Tensor) else None
    if x is not None and x.ndim == 4:
        grids = [(H, W) for H, W in (x.shape[2:], x.shape[1:3]) if n == H * W and min(H, W) > 1]
        if grids:  # as many channels as rows fit both ways: the image's shape decides
            tall = call.image[0] / call.image[1] if call.image else 1.0
            return (Segment("grid", min(grids, key=lambda grid: abs(grid[0] / grid[1] - tall))),)
    if n == 1:
        return (Segment("token", (1,)),)
    if call.image is None:
        return None
    for prefix in dict.fromkeys((call.prefix, 0, 1)):
        for stride in range(1, max(call.image) + 1):
            for up in (True, False):
                H, W = (-(-side // stride) if up else side // stride for side in call.image)
                if n - prefix == H * W and H * W > 1:
                    grid = Segment("grid", (H, W))
                    return (Segment("prefix", (prefix,)), grid) if prefix else (grid,)
    return None


@register_map(SpatialReductionAttention)
def spatial_reduction(layer: nn.Module, call: Call) -> Explanation:
    found = explain_product(call.products[0], call.dtype)
    grid = tuple(call.arg(1, "grid"))
    keys = Segment("grid", grid)
    if layer.sr is not None:
        keys = Segment("pooled", tuple(side // layer.sr.stride[0] for side in grid))
    return replace(found, queries=(Segment("grid", grid),), keys=(keys,))


@register_map(StripeAttention)
def stripe(layer: nn.Module, call: Call) -> Explanation:
    """CSWin's stripes, with LePE of each stripe's values; padding is masked, so its weights are zero."""
    x, grid = call.x, tuple(call.arg(1, "grid"))
    B, N, C = x.shape[1:]
    shape = stripe_shape(layer.idx, layer.split_size, grid)
    padded = pad_to(grid, shape)
    y = F.pad(x.reshape(3 * B, *grid, C), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
    y = stripes(y.reshape(3 * B, padded[0] * padded[1], C), padded, shape)
    q, k, v = y.reshape(3, -1, shape[0] * shape[1], C).unbind(0)
    local = depthwise_residual(torch.zeros_like(v), v, layer.get_v.weight.reshape(1, C, 9), layer.get_v.bias, shape)
    placement = partition(grid, shape, device=x.device)
    outside = (placement.index >= N).repeat(B, 1)[:, None, None]
    bias = torch.zeros(outside.shape, dtype=x.dtype, device=x.device).masked_fill(outside, float("-inf"))
    q, k, v = (t.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    rows = softmax_rows(q, k, q.shape[-1] ** -0.5, bias)
    inner = Explanation("softmax", rows, layer.num_heads, q.shape[0], values=v, added={"depthwise": local})
    return place(inner, placement)


def _routed(layer: nn.Module, call: Call, q: torch.Tensor) -> torch.Tensor | None:
    """Gates (B, heads, N), as the layer itself made them: another precision might choose other heads."""
    if not layer.routed:
        return None
    x = call.args[0]
    gates = call.module.gates(x, q.to(x.dtype))
    return gates.to(call.dtype).transpose(1, 2)


@register_map(MoHAttention)
def moh(layer: nn.Module, call: Call) -> Explanation:
    x = call.x
    B, N, _ = x.shape
    q, k, v = layer.qkv(x).view(B, N, 3, layer.num_heads, layer.head_dim).unbind(2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    bias = call.arg(2, "attn_mask")
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=x.dtype, device=x.device).masked_fill(~bias, float("-inf"))
        bias = bias.to(x.dtype).expand(B, layer.num_heads, N, N)
    own = call.module
    first = call.args[0]
    own_q = own.qkv(first).view(B, N, 3, own.num_heads, own.head_dim)[:, :, 0]
    gates = _routed(layer, call, own.q_norm(own_q))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grid = call.arg(1, "grid")
    where = (Segment("grid", tuple(grid)),) if grid is not None else locate(N, call) or (Segment("tokens", (N,)),)
    return Explanation("softmax", softmax_rows(q, k, layer.scale, bias), layer.num_heads, B, where, where, v, gates)


@register_map(CosineAttention)
def cosine(layer: nn.Module, call: Call) -> Explanation:
    x = call.x
    B, N, _ = x.shape
    grid = tuple(call.arg(1, "grid") or layer.grid)
    qkv = layer.qkv(x).view(B, N, 3, layer.num_heads, layer.head_dim)
    q, k, v = F.normalize(qkv[:, :, 0], dim=-1), F.normalize(qkv[:, :, 1], dim=-1), qkv[:, :, 2]
    gates = _routed(layer, call, q)
    scale = (F.softplus(layer.temperature) * math.log(N)).view(layer.num_heads, 1)
    q = (q + layer.query_embedding.view(layer.num_heads, layer.head_dim)) * scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    where = (Segment("grid", grid),)
    rows = softmax_rows(q, k, 1.0, layer.position_bias(grid, grid))
    return Explanation("softmax", rows, layer.num_heads, B, where, where, v, gates)


@register_map(AggregatedAttention)
def aggregated(layer: nn.Module, call: Call) -> Explanation:
    """One softmax over a token's window and the pooled map; the learnable tokens' weights of the window are added."""
    x = call.x
    B, N, C = x.shape
    H, W = tuple(call.arg(1, "grid") or layer.grid)
    Hp, Wp = layer.pooled_grid((H, W))
    heads, dim, window = layer.num_heads, layer.head_dim, layer.window_size
    q = layer.q(x).view(B, N, heads, dim)
    gates = _routed(layer, call, q)
    pooled = F.gelu(F.linear(x, layer.sr.weight.flatten(1), layer.sr.bias)).transpose(1, 2).reshape(B, C, H, W)
    pooled = layer.norm(F.adaptive_avg_pool2d(pooled, (Hp, Wp)).flatten(2).transpose(1, 2))
    kv = torch.cat([layer.kv(x), layer.kv(pooled)], dim=1).view(B, N + Hp * Wp, 2, heads, dim)
    k, v = F.normalize(kv[:, :, 0], dim=-1).transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    inside = window_validity(H, W, window, x.device)
    unit = F.normalize(q, dim=-1)
    scale = torch.log((inside.sum(1) + Hp * Wp).to(x.dtype))[:, None, None] * F.softplus(layer.temperature).view(-1, 1)
    scaled = ((unit + layer.query_embedding.view(heads, dim)) * scale).transpose(1, 2)
    learned = torch.einsum("bnhd,hdj->bhnj", unit, layer.learnable_tokens) + layer.learnable_bias
    pool_bias = layer.position_bias((H, W), (Hp, Wp))
    step = torch.arange(window, device=x.device) - window // 2
    offset = (step[:, None] * W + step[None]).reshape(-1)

    def near(i: torch.Tensor) -> torch.Tensor:
        """Keys (n, window ** 2) of the window, N where it leaves the map."""
        return (i[:, None] + offset).masked_fill(~inside[i], N)

    def to_grid(weights: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        out = weights.new_zeros(*weights.shape[:3], N + 1)
        return out.scatter_(3, near(i).expand_as(weights), weights)[..., :N]

    def rows(i: torch.Tensor) -> torch.Tensor:
        logits = scaled[:, :, i] @ k.transpose(-2, -1)
        index = near(i).clamp(max=N - 1).expand(B, heads, -1, -1)
        local = logits.gather(3, index) + layer.relative_pos_bias_local[:, None]
        local = local.masked_fill(~inside[i], float("-inf"))
        weights = torch.cat([local, logits[..., N:] + pool_bias[:, i]], dim=-1).softmax(dim=-1)
        return torch.cat([to_grid(weights[..., : window**2], i), weights[..., window**2 :]], dim=-1)

    def learned_rows(i: torch.Tensor) -> torch.Tensor:
        return F.pad(to_grid(learned[:, :, i], i), (0, Hp * Wp))

    grid = Segment("grid", (H, W))
    return Explanation("softmax", rows, heads, B, (grid,), (grid, Segment("pooled", (Hp, Wp))), v, gates, learned_rows)

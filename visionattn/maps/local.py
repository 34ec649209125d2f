"""Attention inside blocks and neighbourhoods, put at its place in the image."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.layers.halo import HaloAttention
from visionattn.layers.neighborhood import NeighborhoodAttention
from visionattn.ops.halo.reference import relative_rows
from visionattn.ops.local.patterns import Pattern
from visionattn.ops.local.reference import bias_index

from .registry import Call, register_map
from .result import AttentionMap, Explanation, Segment


@register_map(HaloAttention)
def halo(layer: nn.Module, call: Call) -> Explanation:
    """Blocks of queries and their haloed windows; what falls on zeros beyond the map is the last key, ``'outside'``."""
    x = call.x
    if x.ndim == 3:
        grid = call.arg(1, "grid") or layer.grid
        x = x[:, layer.num_prefix_tokens :].transpose(1, 2).unflatten(2, tuple(grid))
    B, _, H, W = x.shape
    heads, dim, b, halo_size = layer.num_heads, layer.dim_head, layer.block_size, layer.halo_size
    q = layer.q(x).unflatten(1, (heads, dim))  # (B, heads, dim, Hq, Wq)
    k, v = layer.kv(x).unflatten(1, (heads, -1)).split([dim, layer.dim_head_v], dim=2)
    Hq, Wq = q.shape[-2:]
    bq, win = b // layer.stride, b + 2 * halo_size
    rel = layer.scale if layer.scale_pos_embed else 1.0
    rows_h = relative_rows(layer.pos_embed.height_rel, bq, win, 1)
    rows_w = relative_rows(layer.pos_embed.width_rel, bq, win, 1)
    q, k, v = q.flatten(3).transpose(2, 3), k.flatten(3), v.flatten(3).transpose(2, 3)
    k, v = F.pad(k, (0, 1)), F.pad(v, (0, 0, 0, 1))  # the key beyond the map, zero
    step = torch.arange(win, device=x.device)

    def rows(i: torch.Tensor) -> torch.Tensor:
        y, c = i // Wq, i % Wq
        key_y = (y // bq * b - halo_size)[:, None] + step
        key_x = (c // bq * b - halo_size)[:, None] + step
        inside = ((key_y >= 0) & (key_y < H))[:, :, None] & ((key_x >= 0) & (key_x < W))[:, None]
        index = (key_y[:, :, None] * W + key_x[:, None]).masked_fill(~inside, H * W).flatten(1)  # (n, win * win)
        some = q[:, :, i]
        positions = torch.einsum("bhnd,nwd->bhnw", some, rows_h[y % bq]).unsqueeze(-1)
        positions = positions + torch.einsum("bhnd,nwd->bhnw", some, rows_w[c % bq]).unsqueeze(-2)
        index = index.expand(B, heads, -1, -1)
        logits = (some @ k).gather(3, index) * layer.scale + positions.flatten(3) * rel
        if layer.border == "mask":
            logits = logits.masked_fill(~inside.flatten(1), float("-inf"))
        weights = logits.softmax(dim=-1)
        return weights.new_zeros(B, heads, len(i), H * W + 1).scatter_add_(3, index, weights)

    keys = (Segment("grid", (H, W)), Segment("outside", (1,)))
    return Explanation("softmax", rows, heads, B, (Segment("grid", (Hq, Wq)),), keys, v)


def pattern_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, ...],
    pattern: Pattern,
    scale: float,
    bias: torch.Tensor | None = None,
    text: int = 0,
):
    """Rows of local attention on [text | grid]: a function of query indices, to weights (B, heads, n, text + N).

    Args:
        q, k: (B, heads, text + N, D).
        grid, pattern, scale, bias: of :func:`visionattn.ops.local.local_attention`.
        text: tokens before the grid, which see all and are seen by all.
    """
    n = math.prod(grid)
    keys = torch.arange(n, device=q.device)[None]

    def rows(i: torch.Tensor) -> torch.Tensor:
        logits = q[:, :, i] @ k.transpose(-2, -1) * scale
        on_grid = i >= text
        queries = (i[on_grid] - text)[:, None]
        if bias is not None:
            extra = logits.new_zeros(bias.shape[0], len(i), n)
            extra[:, on_grid] = bias.to(logits.dtype)[(slice(None), *bias_index(pattern, grid, queries, keys))]
            logits = logits + F.pad(extra, (text, 0))
        hidden = torch.zeros(len(i), text + n, dtype=torch.bool, device=q.device)
        hidden[on_grid, text:] = ~pattern.visible(grid, queries, keys)
        return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)

    return rows


def local_map(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...],
    pattern: Pattern,
    text: int = 0,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> AttentionMap:
    """The map of :func:`visionattn.ops.local.local_attention` for its arguments, CLEAR's and GNA's patterns too.

    Args:
        q, k, v: (B, text + N, H, D), text first; as many heads of keys as of queries.
        grid, pattern, text, bias, scale: as there.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    where = (Segment("grid", tuple(grid)),)
    where = (Segment("prefix", (text,)), *where) if text else where
    weights = pattern_rows(q, k, tuple(grid), pattern, scale, bias, text)(torch.arange(q.shape[2], device=q.device))
    return AttentionMap("local_attention", type(pattern).__name__, "softmax", weights, where, where, values=v)


@register_map(NeighborhoodAttention)
def neighborhood(layer: nn.Module, call: Call) -> Explanation:
    """A window around every token, with its dilation and biases; a map smaller than the window is padded, and the
    padding takes part as it does in the layer."""
    x, P = call.x, 0
    if x.ndim == 3:
        P, grid = layer.num_prefix_tokens, tuple(call.arg(1, "grid") or layer.grid)
    else:
        grid, x = tuple(x.shape[1:-1]), x.flatten(1, -2)
    padded = tuple(max(side, least) for side, least in zip(grid, layer.least, strict=True))
    # grid tokens keep their places in the result, padding comes after them
    place = torch.arange(math.prod(grid), device=x.device).reshape(grid)
    pad = [n for side, full in zip(reversed(grid), reversed(padded), strict=True) for n in (0, full - side)]
    place = F.pad(place, pad, value=-1).flatten()
    real = place >= 0
    full = x.new_zeros(x.shape[0], len(place), x.shape[2])
    full[:, real] = x[:, P:]
    full = torch.cat([x[:, :P], full], dim=1)
    q, k, v = layer.qkv(full).unflatten(2, (3, layer.num_heads, layer.head_dim)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    inner = pattern_rows(q, k, padded, layer.pattern, layer.scale, layer.rpb, P)
    order = torch.cat([torch.nonzero(real).flatten(), torch.nonzero(~real).flatten()]) + P
    order = torch.cat([torch.arange(P, device=x.device), order])

    def rows(i: torch.Tensor) -> torch.Tensor:
        return inner(order[i])[..., order]

    prefix = (Segment("prefix", (P,)),) if P else ()
    queries = (*prefix, Segment("grid", grid))
    padding = int((~real).sum())
    keys = (*queries, Segment("padding", (padding,))) if padding else queries
    return Explanation("softmax", rows, layer.num_heads, x.shape[0], queries, keys, v[:, :, order])

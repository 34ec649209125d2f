"""Attention that is linear in the number of tokens: the weights that it implies, row by row."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.layers.agent import AgentAttention
from visionattn.layers.inline import InLineAttention
from visionattn.layers.mala import MALA
from visionattn.layers.stripes import pad_to, stripe_shape, stripes
from visionattn.ops.agent import agent_attention_reference, pool_agents
from visionattn.ops.depthwise import depthwise_residual
from visionattn.ops.inline import feature_map
from visionattn.ops.linear import beta, local_values, phi, rotate

from .registry import Call, register_map
from .result import Explanation, Segment
from .softmax import softmax_rows
from .windows import partition, place


def _heads(t: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, C) to (B, heads, N, D)."""
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _where(prefix: int, grid: tuple[int, int]) -> tuple[Segment, ...]:
    return (Segment("prefix", (prefix,)), Segment("grid", grid)) if prefix else (Segment("grid", grid),)


@register_map(AgentAttention)
def agent(layer: nn.Module, call: Call) -> Explanation:
    """Equation 6: softmax(q agents^T) softmax(agents k^T), a product of rank n; the depthwise term stands beside it."""
    x, grid = call.x, tuple(call.arg(1, "grid") or layer.grid)
    if layer.proj is None:
        return _agent_stripes(layer, x, grid)
    if layer.qkv is not None:
        q, k, v = layer.qkv(x).chunk(3, dim=2)
    else:
        q = layer.q(x)
        if layer.sr is not None:
            x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
            x = layer.norm(layer.sr(x).flatten(2).transpose(1, 2))
        k, v = layer.kv(x).chunk(2, dim=2)
    found = _agent_mix(layer, q, k, v, grid, layer.dwc)
    return found if call.placement is None else place(found, call.placement)


def _agent_mix(layer: nn.Module, q, k, v, grid: tuple[int, int], conv: nn.Module) -> Explanation:
    heads, P, C = layer.num_heads, layer.num_prefix_tokens, q.shape[2]
    over_keys, over_agents = layer.biases(grid)
    agents = pool_agents(q[:, P:], grid, layer.agent_shape)
    qkv = (t.unflatten(2, (heads, -1)) for t in (q, k, v, agents))
    _, gather, spread = agent_attention_reference(*qkv, over_keys, over_agents, layer.scale)
    keys, local = _where(P, grid), v
    if layer.sr_ratio > 1:
        h, w = grid[0] // layer.sr_ratio, grid[1] // layer.sr_ratio
        keys = (Segment("pooled", (h, w)),)
        local = v.transpose(1, 2).reshape(v.shape[0], C, h, w)
        local = F.interpolate(local, size=list(grid), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    local = depthwise_residual(torch.zeros_like(q), local, conv.weight.reshape(1, C, 9), conv.bias, grid, P)
    return Explanation(
        "softmax",
        lambda i: spread[:, :, i] @ gather,
        heads,
        q.shape[0],
        _where(P, grid),
        keys,
        _heads(v, heads),
        added={"depthwise": local},
        factors={"spread": spread, "gather": gather},
    )


def _agent_stripes(layer: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> Explanation:
    shape = stripe_shape(layer.idx, layer.split_size, grid)
    if shape == grid:
        return _agent_mix(layer, x[0], x[1], x[2], grid, layer.get_v)
    B, _, C = x.shape[1:]
    padded = pad_to(grid, shape)
    x = F.pad(x.reshape(3 * B, *grid, C), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
    q, k, v = stripes(x.reshape(3 * B, -1, C), padded, shape).reshape(3, -1, shape[0] * shape[1], C).unbind(0)
    return place(_agent_mix(layer, q, k, v, shape, layer.get_v), partition(grid, shape, device=x.device))


@register_map(InLineAttention)
def inline(layer: nn.Module, call: Call) -> Explanation:
    """Equation 5: scores less their mean over the keys, plus 1 / N; the predicted 3 x 3 kernels stand beside it."""
    x, grid = call.x, tuple(call.arg(1, "grid") or layer.grid)
    if layer.proj is None:
        q, k, v = x
        mean = call.kwargs["x_mean"].to(x.dtype)
    elif layer.qkv is not None:
        q, k, v = layer.qkv(x).chunk(3, dim=2)
        mean = x.mean(dim=1)
    else:
        q, (k, v) = layer.q(x), layer.kv(x).chunk(2, dim=2)
        mean = x.mean(dim=1)
    B, N, C = q.shape
    P, heads = layer.num_prefix_tokens, layer.num_heads
    q, k = (_heads(feature_map(t, layer.kernel_func), heads) for t in (q, k))
    kernels, bias = layer.local_kernels(mean), None
    if layer.get_v is not None:
        kernels, bias = kernels + layer.get_v.weight.reshape(1, C, 9), layer.get_v.bias

    def rows(i: torch.Tensor) -> torch.Tensor:
        scores = q[:, :, i] @ k.transpose(-2, -1) * (layer.scale / N)
        return scores - scores.mean(dim=-1, keepdim=True) + 1.0 / N

    where = _where(P, grid)
    local = depthwise_residual(torch.zeros_like(v), v, kernels, bias, grid, P)
    found = Explanation("signed", rows, heads, B, where, where, _heads(v, heads), added={"depthwise": local})
    return found if call.placement is None else place(found, call.placement)


@register_map(MALA)
def mala(layer: nn.Module, call: Call) -> Explanation:
    """beta s - gamma of the paper (section 3), or the layer's softmax twin; then the local term, then the gate."""
    x, grid = call.x, call.arg(1, "grid") or layer.grid
    if x.ndim == 4:
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
    grid, heads, P = tuple(grid), layer.num_heads, layer.num_prefix_tokens
    B, N, C = x.shape
    qkvo = layer.qkvo(x)
    tables = call.kwargs.get("tables")
    tables = layer.rope(grid, P, x.dtype) if tables is None else tables
    sin, cos = (t.to(x.dtype) for t in tables)
    q, k, v, gate = qkvo.split(C, dim=2)
    local = local_values(v, layer.lepe.weight, layer.lepe.bias, grid)
    q, k = q.unflatten(2, (heads, -1)), k.unflatten(2, (heads, -1))
    if layer.linear:
        q, k = phi(q), phi(k)
    turned_q, turned_k = (rotate(t, sin, cos).transpose(1, 2) for t in (q, k))
    scale = (C // heads) ** -0.5
    z = torch.einsum("bnhd,bhd->bhn", q, k.sum(dim=1)) * (scale / N)

    def rows(i: torch.Tensor) -> torch.Tensor:
        scores = turned_q[:, :, i] @ turned_k.transpose(-2, -1) * (scale / N)
        return beta(z[:, :, i, None]) * scores - z[:, :, i, None] / N

    where = _where(P, grid)
    found = Explanation(
        "signed", rows, heads, B, where, where, _heads(v, heads), added={"depthwise": local}, multiplied={"gate": gate}
    )
    if layer.linear:
        return found
    return replace(found, kind="softmax", rows=softmax_rows(turned_q, turned_k, scale))

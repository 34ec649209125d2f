"""Attention along edges: dense rows of nodes, and the weights of the edges themselves."""

import torch
from torch import nn

from visionattn.layers.graph_transformer import GraphAttention, GraphTransformerLayer, grid_neighbours
from visionattn.models.graph_vit import NeighbourAttention
from visionattn.ops.graph.reference import CLAMP

from .registry import Call, register_map
from .result import Explanation, Segment
from .softmax import locate


@register_map(GraphAttention)
def edges(layer: nn.Module, call: Call) -> Explanation:
    """A softmax over the edges that end in a node; a node without any has a row of zeros. Nodes are one batch entry."""
    h, graph, e = call.x, call.arg(1, "graph"), call.arg(2, "e")
    weights = layer.weights(h, graph, None if e is None else e.to(h.dtype)).to(h.dtype)  # (E, heads)
    values = layer.project(h)[2].transpose(0, 1).unsqueeze(0)
    nodes = graph.num_nodes

    def rows(i: torch.Tensor) -> torch.Tensor:
        row = torch.full((nodes,), -1, dtype=torch.int64, device=h.device)
        row[i] = torch.arange(len(i), device=h.device)
        place = row[graph.dst.long()]
        chosen = place >= 0
        out = weights.new_zeros(len(i), nodes, layer.num_heads)
        index = (place[chosen], graph.src.long()[chosen])
        out.index_put_(index, weights[chosen], accumulate=True)
        return out.permute(2, 0, 1).unsqueeze(0)

    where = (Segment("tokens", (nodes,)),)
    return Explanation("softmax", rows, layer.num_heads, 1, where, where, values, edges=(graph.src, graph.dst, weights))


def _neighbours(
    q: torch.Tensor, k: torch.Tensor, neighbour: torch.Tensor, valid: torch.Tensor | None
):  # what ops.graph.neighbour_attention_reference computes, and its weights
    """Rows for q, k (B, N, heads, D) whose nodes attend to ``neighbour`` (N, K) or (B, N, K)."""
    B, N, heads, D = q.shape
    neighbour = neighbour.expand(B, -1, -1)

    def rows(i: torch.Tensor) -> torch.Tensor:
        index = neighbour[:, i][:, None].expand(-1, heads, -1, -1)
        scores = torch.einsum("bnhd,bmhd->bhnm", q[:, i], k) * D**-0.5
        weights = scores.gather(3, index).clamp(-CLAMP, CLAMP).exp()
        if valid is not None:
            weights = weights * valid.expand(B, -1, -1)[:, None, i].to(weights.dtype)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        return weights.new_zeros(B, heads, len(i), N).scatter_add_(3, index, weights)

    return rows


@register_map(NeighbourAttention)
def neighbour(layer: nn.Module, call: Call) -> Explanation:
    x = call.x
    q, k, v = (linear(x).unflatten(2, (layer.num_heads, -1)) for linear in (layer.Q, layer.K, layer.V))
    rows = _neighbours(q, k, call.args[1], call.args[2])
    where = locate(x.shape[1], call) or (Segment("tokens", (x.shape[1],)),)
    return Explanation("softmax", rows, layer.num_heads, x.shape[0], where, where, v.transpose(1, 2))


@register_map(GraphTransformerLayer)
def on_grid(layer: nn.Module, call: Call) -> Explanation | None:
    """Tokens of a grid; prefix tokens pass by. A graph's nodes are left to the attention inside."""
    if call.args[0].ndim == 2:
        return None
    x, grid = call.x[:, layer.num_prefix_tokens :], tuple(call.arg(1, "graph") or layer.grid)
    q, k, v = layer.attention.project(x)
    rows = _neighbours(q, k, *grid_neighbours(grid, layer.neighbours, x.device))
    where = (Segment("grid", grid),)
    return Explanation("softmax", rows, layer.attention.num_heads, x.shape[0], where, where, v.transpose(1, 2))

"""The graph transformer of Dwivedi & Bresson: 'A Generalization of Transformer Networks to Graphs' (DLG-AAAI 2021).

Paper: https://arxiv.org/abs/2012.09699. Attention runs along the edges of a sparse graph; nodes get Laplacian
eigenvectors as positions; edges may have features of their own, which weigh the scores and are updated as well.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.ops.graph import (
    Graph,
    as_graph,
    edge_scores,
    edge_weights,
    full_graph,
    graph_attention,
    make_graph,
    neighbour_attention_reference,
)
from visionattn.ops.graph.reference import EPSILON

from .mixer import Mixer
from .registry import register_module

__all__ = [
    "GraphAttention",
    "GraphTransformerLayer",
    "GraphTransformerNet",
    "MLPReadout",
    "batch_norm_rows",
    "grid_neighbours",
]

OFFSETS = {
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}


def grid_neighbours(grid: tuple[int, int], k: int = 8, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours of every position of a grid (H, W): indices (H * W, k) int64 and booleans that are False outside it.

    A grid of a single position is its own neighbour (it would have none).

    Raises:
        ValueError: where k is not 4 or 8.
    """
    if k not in OFFSETS:
        raise ValueError(f"a grid has k=4 or k=8 neighbours, got k={k}")
    H, W = grid
    offsets = torch.tensor(OFFSETS[k], device=device)
    y = torch.arange(H, device=device)[:, None, None] + offsets[:, 0]
    x = torch.arange(W, device=device)[None, :, None] + offsets[:, 1]
    valid = ((y >= 0) & (y < H) & (x >= 0) & (x < W)).reshape(H * W, k)
    index = (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).reshape(H * W, k)
    return index, valid if H * W > 1 else torch.ones_like(valid)


def batch_norm_rows(norm: nn.BatchNorm1d, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Batch norm of x (N, C) over its rows; in training only rows with ``valid`` (N,) 1 rather than 0 count.

    Padding that keeps tensors at one size (a CUDA graph wants that) so leaves the statistics as they are without it.
    """
    if valid is None or not norm.training:
        return norm(x)
    count = valid.sum()
    share = valid / count
    mean = share @ x
    centred = x - mean
    var = share @ centred.square()
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return centred * ((var + norm.eps).rsqrt() * norm.weight) + norm.bias


class GraphAttention(nn.Module):
    """Projections and attention along edges (equations 3 to 5; with edge features 10 to 12).

    Args:
        in_dim, out_dim: channels of nodes (and edges) in and out.
        num_heads: heads, of out_dim / num_heads channels each.
        use_bias: biases of the projections.
        edge_feat: whether edges have features.
        backend: of :func:`visionattn.ops.graph.graph_attention`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_heads: int,
        use_bias: bool = False,
        edge_feat: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads, self.head_dim, self.backend = num_heads, out_dim // num_heads, backend
        self.Q = nn.Linear(in_dim, out_dim, bias=use_bias, **dd)
        self.K = nn.Linear(in_dim, out_dim, bias=use_bias, **dd)
        self.V = nn.Linear(in_dim, out_dim, bias=use_bias, **dd)
        if edge_feat:
            self.proj_e = nn.Linear(in_dim, out_dim, bias=use_bias, **dd)

    def project(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (.., heads, channels) of nodes (.., in_dim), by one product."""
        weight = torch.cat([self.Q.weight, self.K.weight, self.V.weight])
        bias = None if self.Q.bias is None else torch.cat([self.Q.bias, self.K.bias, self.V.bias])
        qkv = F.linear(h, weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)
        return q, k, v

    def project_edges(self, e: torch.Tensor | None) -> torch.Tensor | None:
        return None if e is None else self.proj_e(e).unflatten(-1, (self.num_heads, self.head_dim))

    def forward(
        self, h: torch.Tensor, graph: Graph, e: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attended nodes (N, out_dim) and the scores of edges by channel (E, out_dim), None without edge features."""
        out, scores = graph_attention(*self.project(h), graph, self.project_edges(e), self.backend)
        return out.flatten(1), None if scores is None else scores.flatten(1)

    def weights(self, h: torch.Tensor, graph: Graph, e: torch.Tensor | None = None) -> torch.Tensor:
        """Softmax weights of the edges at their destinations, (E, heads), in the order of the edge list."""
        q, k, _ = self.project(h)
        scores = edge_scores(q, k, graph.src, graph.dst, self.project_edges(e))
        return edge_weights(scores, graph.dst, graph.num_nodes, 0.0 if e is None else EPSILON)


@register_module("graph_transformer", "mixer")
class GraphTransformerLayer(Mixer):
    """A layer of the graph transformer: attention along edges and a feed-forward, each residual, norms after them.

    Takes nodes (N, in_dim) with a graph, or tokens (B, N, in_dim) with their grid (H, W), whose positions are nodes
    with ``neighbours`` neighbours each.

    Args:
        in_dim, out_dim: channels in and out; ``dim`` is accepted for both.
        num_heads: heads; must divide out_dim.
        dropout: dropout after attention and inside the feed-forward.
        layer_norm, batch_norm: the norms; both are applied where both are on, the layer norm first.
        residual: False removes every residual (attention, feed-forward, nodes, edges).
        use_bias: biases of the projections; ``qkv_bias`` is accepted for it.
        edge_feat: whether edges have features (E, in_dim), which are then updated too.
        update_edges: False leaves out the edges' update, which the last layer of a net does not need.
        neighbours: 4 or 8, on a grid.
        grid: default grid of tokens that come without one (as an ``attn_layer`` of timm's VisionTransformer).
        num_prefix_tokens: leading tokens that are not on the grid: they pass unchanged.
        backend: of :func:`visionattn.ops.graph.graph_attention`.
        proj_bias, attn_drop, proj_drop, qk_norm, scale_norm, norm_layer, depth: what timm hands an ``attn_layer``;
            dropout is the larger one of its two, norms of queries and keys have to be off, the rest has no effect.

    Raises:
        ValueError: for sizes that do not fit; in forward, for a graph, grid or edge features that do not.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        out_dim: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.0,
        layer_norm: bool = False,
        batch_norm: bool = True,
        residual: bool = True,
        use_bias: bool = False,
        edge_feat: bool = False,
        update_edges: bool = True,
        neighbours: int = 8,
        dim: int | None = None,
        qkv_bias: bool | None = None,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        depth: int = 0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        in_dim = dim if in_dim is None else in_dim
        out_dim = in_dim if out_dim is None else out_dim
        if not in_dim or out_dim % num_heads:
            raise ValueError(f"GraphTransformerLayer: out_dim={out_dim} is not made of num_heads={num_heads} heads")
        if residual and in_dim != out_dim:
            raise ValueError(f"GraphTransformerLayer: {in_dim} to {out_dim} channels has no residual: residual=False")
        if qk_norm or scale_norm:
            raise ValueError(
                f"GraphTransformerLayer has no qk_norm={qk_norm}, scale_norm={scale_norm}: switch them off"
            )
        if neighbours not in OFFSETS:
            raise ValueError(f"GraphTransformerLayer: a grid has neighbours=4 or 8, got {neighbours}")
        self.layer_norm, self.batch_norm, self.residual = layer_norm, batch_norm, residual
        self.dropout = max(dropout, attn_drop, proj_drop)
        self.edge_feat, self.update_edge_features = edge_feat, edge_feat and update_edges
        self.neighbours, self.grid, self.num_prefix_tokens = neighbours, grid, num_prefix_tokens
        use_bias = use_bias if qkv_bias is None else qkv_bias
        self.attention = GraphAttention(in_dim, out_dim, num_heads, use_bias, edge_feat, backend, **dd)
        for branch in ("",) if not edge_feat else ("_h", "_e") if update_edges else ("_h",):
            setattr(self, f"O{branch}", nn.Linear(out_dim, out_dim, **dd))
            setattr(self, f"FFN{branch}_layer1", nn.Linear(out_dim, 2 * out_dim, **dd))
            setattr(self, f"FFN{branch}_layer2", nn.Linear(2 * out_dim, out_dim, **dd))
            for place in (1, 2):
                if layer_norm:
                    setattr(self, f"layer_norm{place}{branch}", nn.LayerNorm(out_dim, **dd))
                if batch_norm:
                    setattr(self, f"batch_norm{place}{branch}", nn.BatchNorm1d(out_dim, **dd))

    def _norm(self, x: torch.Tensor, name: str, valid: torch.Tensor | None) -> torch.Tensor:
        if self.layer_norm:
            x = getattr(self, f"layer_norm{name}")(x)
        if self.batch_norm:
            x = batch_norm_rows(getattr(self, f"batch_norm{name}"), x, valid)
        return x

    def update(
        self, x: torch.Tensor, attended: torch.Tensor, branch: str = "", valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What follows attention, on rows (N, C): output projection, norm, feed-forward, norm, with residuals.

        Args:
            branch: '' for nodes of a layer without edge features, else '_h' for nodes and '_e' for edges.
            valid: (N,) 1 for rows that batch statistics count, 0 for padding.
        """
        out = getattr(self, f"O{branch}")(F.dropout(attended, self.dropout, self.training))
        x = self._norm(x + out if self.residual else out, f"1{branch}", valid)
        hidden = F.relu(getattr(self, f"FFN{branch}_layer1")(x))
        out = getattr(self, f"FFN{branch}_layer2")(F.dropout(hidden, self.dropout, self.training))
        return self._norm(x + out if self.residual else out, f"2{branch}", valid)

    def forward(
        self,
        x: torch.Tensor,
        graph: Any = None,
        *edges: torch.Tensor | None,
        e: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Updated nodes; with edge features, nodes and edges.

        Args:
            x: nodes (N, in_dim), or tokens (B, N, in_dim).
            graph: for nodes, what :func:`visionattn.ops.graph.as_graph` takes, (src, dst) for one, or src followed by
                dst; for tokens, their grid (H, W).
            e: edge features (E, in_dim) in the order of the edge list, also as the last positional argument.
        """
        assert attn_mask is None and not is_causal, "GraphTransformerLayer takes no mask"
        if x.ndim == 3:
            return self._forward_grid(x, self.grid if graph is None else graph)
        if isinstance(graph, torch.Tensor) and graph.ndim == 1:
            graph, edges = (graph, edges[0]), edges[1:]
        e = edges[0] if edges else e
        if (e is not None) != self.edge_feat:
            given, does = ("no e", "has") if e is None else ("e", "has no")
            raise ValueError(f"GraphTransformerLayer got {given}, but {does} edge features: see edge_feat")
        graph = as_graph(graph, x.shape[0])
        attended, scores = self.attention(x, graph, e)
        if not self.edge_feat:
            return self.update(x, attended)
        x = self.update(x, attended, "_h")
        return x, self.update(e, scores, "_e") if self.update_edge_features else e

    def _forward_grid(self, x: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        if grid is None:
            raise ValueError("GraphTransformerLayer: tokens came without their grid: pass grid=(H, W)")
        if self.edge_feat:
            raise ValueError("GraphTransformerLayer: a grid's edges have no features: build it with edge_feat=False")
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        B, N, C = tokens.shape
        if grid[0] * grid[1] != N:
            raise ValueError(f"GraphTransformerLayer: {N} tokens are not a {grid[0]} x {grid[1]} grid: pass theirs")
        neighbour, valid = grid_neighbours(grid, self.neighbours, x.device)
        attended = neighbour_attention_reference(*self.attention.project(tokens), neighbour, valid)
        out = self.update(tokens.reshape(B * N, C), attended.reshape(B * N, -1)).reshape(B, N, -1)
        return torch.cat([prefix, out], dim=1) if self.num_prefix_tokens else out


class MLPReadout(nn.Module):
    """input_dim -> input_dim / 2 -> ... -> output_dim with L hidden layers, each half as wide, and ReLU."""

    def __init__(self, input_dim: int, output_dim: int, L: int = 2, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        widths = [input_dim // 2**i for i in range(L + 1)]
        layers = [nn.Linear(a, b, **dd) for a, b in itertools.pairwise(widths)]
        self.FC_layers = nn.ModuleList([*layers, nn.Linear(widths[-1], output_dim, **dd)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.FC_layers[:-1]:
            x = F.relu(layer(x))
        return self.FC_layers[-1](x)


class GraphTransformerNet(nn.Module):
    """The paper's networks, built from the ``net_params`` of the released configurations.

    Three tasks, told apart by which sizes are given:

    - ``num_atom_type, num_bond_type`` (ZINC): regression of graphs, edges of types; (num_graphs, 1).
    - ``in_dim, n_classes`` (PATTERN, CLUSTER): classification of nodes, no edge features; (N, n_classes).
    - ``in_dim, in_dim_edge, n_classes`` (superpixels): classification of graphs with real features of nodes
      (N, in_dim) and edges (E, in_dim_edge); (num_graphs, n_classes).

    Args:
        L, hidden_dim, out_dim, n_heads, residual, layer_norm, batch_norm, dropout: of the layers; the last one gives
            out_dim channels.
        in_feat_dropout: on the node embedding, before the position is added (ZINC) or after it (others), as released.
        readout: 'mean', 'sum' or 'max' over the nodes of a graph.
        edge_feat: False gives every edge the feature 1 (ZINC).
        lap_pos_enc, pos_enc_dim: Laplacian eigenvectors as positions, and their number.
        wl_pos_enc: structural roles (at most 36, in node classification 99) as positions.
        full_graph: attention over the complete graph of each graph; bonds are discarded.
        backend: of :func:`visionattn.ops.graph.graph_attention`.
        self_loop, gpu_id, batch_size, total_param: other keys of released configurations; no effect.

    Raises:
        ValueError: for sizes or a readout that do not fit; in forward, where the position that was asked for is absent.
    """

    def __init__(
        self,
        L: int = 10,
        hidden_dim: int = 80,
        out_dim: int | None = None,
        n_heads: int = 8,
        num_atom_type: int | None = None,
        num_bond_type: int | None = None,
        in_dim: int | None = None,
        in_dim_edge: int | None = None,
        n_classes: int | None = None,
        in_feat_dropout: float = 0.0,
        dropout: float = 0.0,
        readout: str = "mean",
        layer_norm: bool = False,
        batch_norm: bool = True,
        residual: bool = True,
        edge_feat: bool = True,
        lap_pos_enc: bool = False,
        pos_enc_dim: int = 8,
        wl_pos_enc: bool = False,
        full_graph: bool = False,
        backend: str = "auto",
        self_loop: bool = False,
        gpu_id: Any = None,
        batch_size: int | None = None,
        total_param: int | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if readout not in ("mean", "sum", "max"):
            raise ValueError(f"readout={readout!r} is unknown: use mean, sum or max")
        self.task = "regression" if num_atom_type else "nodes" if in_dim_edge is None else "graphs"
        if (self.task == "regression" and not num_bond_type) or (
            self.task != "regression" and not (in_dim and n_classes)
        ):
            raise ValueError(
                "GraphTransformerNet needs num_atom_type and num_bond_type (graph regression), or in_dim and n_classes "
                "(node classification), or in_dim, in_dim_edge and n_classes (graph classification)"
            )
        if lap_pos_enc and wl_pos_enc:
            raise ValueError("lap_pos_enc and wl_pos_enc are both on: choose one")
        out_dim = out_dim or hidden_dim
        self.readout, self.full_graph = readout, full_graph
        self.edge_feat, self.lap_pos_enc, self.wl_pos_enc, self.pos_enc_dim = (
            edge_feat,
            lap_pos_enc,
            wl_pos_enc,
            pos_enc_dim,
        )
        self.in_feat_dropout = nn.Dropout(in_feat_dropout)
        if lap_pos_enc:
            self.embedding_lap_pos_enc = nn.Linear(pos_enc_dim, hidden_dim, **dd)
        if wl_pos_enc:
            self.embedding_wl_pos_enc = nn.Embedding(100 if self.task == "nodes" else 37, hidden_dim, **dd)
        if self.task == "graphs":
            self.embedding_h = nn.Linear(in_dim, hidden_dim, **dd)
            self.embedding_e = nn.Linear(in_dim_edge, hidden_dim, **dd)
        else:
            self.embedding_h = nn.Embedding(num_atom_type or in_dim, hidden_dim, **dd)
        if self.task == "regression":
            self.embedding_e = (
                nn.Embedding(num_bond_type, hidden_dim, **dd) if edge_feat else nn.Linear(1, hidden_dim, **dd)
            )
        common = dict(
            num_heads=n_heads, dropout=dropout, layer_norm=layer_norm, batch_norm=batch_norm, residual=residual,
            edge_feat=self.task != "nodes", backend=backend, **dd,
        )  # fmt: skip
        widths = [hidden_dim] * L + [out_dim]
        common_last = {**common, "residual": residual and out_dim == hidden_dim}
        self.layers = nn.ModuleList(
            [
                GraphTransformerLayer(widths[i], widths[i + 1], **(common_last if i == L - 1 else common))
                for i in range(L)
            ]
        )
        self.MLP_layer = MLPReadout(out_dim, 1 if self.task == "regression" else n_classes, **dd)

    def embed(self, h: torch.Tensor, lap_pos_enc: torch.Tensor | None, wl_pos_enc: torch.Tensor | None) -> torch.Tensor:
        """Node features (N, hidden_dim), with their positions."""
        h = self.embedding_h(h)
        if self.task == "regression":
            h = self.in_feat_dropout(h)
        if self.lap_pos_enc:
            if lap_pos_enc is None:
                raise ValueError(f"this net takes Laplacian encodings: pass lap_pos_enc (N, {self.pos_enc_dim})")
            # graphs of few nodes come with fewer columns: zeros stand for the others
            lap_pos_enc = F.pad(lap_pos_enc, (0, self.pos_enc_dim - lap_pos_enc.shape[1]))
            h = h + self.embedding_lap_pos_enc(lap_pos_enc.to(h.dtype))
        if self.wl_pos_enc:
            if wl_pos_enc is None:
                raise ValueError("this net takes structural roles: pass wl_pos_enc (N,)")
            h = h + self.embedding_wl_pos_enc(wl_pos_enc)
        return h if self.task == "regression" else self.in_feat_dropout(h)

    def forward(
        self,
        graph: Any,
        h: torch.Tensor | None = None,
        e: torch.Tensor | None = None,
        lap_pos_enc: torch.Tensor | None = None,
        wl_pos_enc: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of nodes or graphs; see the class.

        Args:
            graph: what :func:`visionattn.ops.graph.as_graph` takes, (src, dst, graph_id) for one. Of a PyTorch
                Geometric ``Batch``, ``x``, ``edge_attr``, ``lap_pos_enc`` and ``wl_pos_enc`` are taken where they are
                not given.
            h: node types (N,), or features (N, in_dim) of superpixels.
            e: edge types (E,), or features (E, in_dim_edge) of superpixels; not read in node classification.
            lap_pos_enc: (N, pos_enc_dim), see :func:`visionattn.ops.graph.laplacian_encoding`.
            wl_pos_enc: (N,), see :func:`visionattn.ops.graph.degree_roles`.
        """
        h = _attribute(graph, "x", h)
        e = _attribute(graph, "edge_attr", e)
        lap_pos_enc = _attribute(graph, "lap_pos_enc", lap_pos_enc)
        wl_pos_enc = _attribute(graph, "wl_pos_enc", wl_pos_enc)
        if h is None:
            raise ValueError("no node features: pass h, or a graph that has x")
        if self.task != "graphs":
            h = h.long().reshape(-1)
        graph = as_graph(graph if not hasattr(graph, "edge_index") else _Edges(graph), h.shape[0])
        return self._run(graph, h, e, lap_pos_enc, wl_pos_enc)

    def _run(self, graph: Graph, h, e, lap_pos_enc, wl_pos_enc) -> torch.Tensor:
        if self.full_graph:
            src, dst = full_graph(graph.graph_id, graph.num_nodes)
            src, dst = src.to(h.device), dst.to(h.device)
            graph = make_graph(src, dst, graph.num_nodes, graph.graph_id, graph.num_graphs)
            e = h.new_zeros(src.shape[0], *(e.shape[1:] if e is not None and self.task == "graphs" else ()))
        h = self.embed(h, lap_pos_enc, wl_pos_enc)
        if self.task == "nodes":
            for layer in self.layers:
                h = layer(h, graph)
            return self.MLP_layer(h)
        if self.task == "regression" and not self.edge_feat:
            e = h.new_ones(graph.src.shape[0], 1)
        elif e is None:
            raise ValueError("no edge features: pass e, or a graph that has edge_attr")
        e = self.embedding_e(e.long().reshape(-1) if isinstance(self.embedding_e, nn.Embedding) else e)
        for layer in self.layers:
            h, e = layer(h, graph, e=e)
        return self.MLP_layer(read_out(h, graph, self.readout))


class _Edges:
    """The edges of a PyTorch Geometric object, without its node features."""

    def __init__(self, data: Any):
        self.edge_index = data.edge_index
        self.batch = getattr(data, "batch", None)
        self.num_graphs = getattr(data, "num_graphs", None)


def _attribute(graph: Any, name: str, given: torch.Tensor | None) -> torch.Tensor | None:
    return given if given is not None or not hasattr(graph, "edge_index") else getattr(graph, name, None)


def read_out(h: torch.Tensor, graph: Graph, how: str) -> torch.Tensor:
    """'mean', 'sum' or 'max' of nodes (N, C) over each graph: (num_graphs, C)."""
    ids = graph.graph_id
    if ids is None:
        ids = torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)
    ids = ids.long()
    if how == "max":
        index = ids[:, None].expand_as(h)
        return h.new_zeros(graph.num_graphs, h.shape[1]).scatter_reduce(0, index, h, "amax", include_self=False)
    total = h.new_zeros(graph.num_graphs, h.shape[1]).index_add(0, ids, h)
    if how == "sum":
        return total
    count = h.new_zeros(graph.num_graphs).index_add(0, ids, h.new_ones(h.shape[0]))
    return total / count.clamp_min(1)[:, None]

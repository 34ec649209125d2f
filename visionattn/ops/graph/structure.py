"""Graphs as edge lists, and the sorted form of them that segment reductions read."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class CSR(NamedTuple):
    """The edges of every node, one node after the other.

    ``neighbour[start[i]:start[i + 1]]`` are the other ends of node i's edges, ``edge`` their places in the edge list.
    """

    start: torch.Tensor  # (N + 1,) int32
    neighbour: torch.Tensor  # (E,) int32
    edge: torch.Tensor  # (E,) int64


def to_csr(at: torch.Tensor, other: torch.Tensor, num_nodes: int) -> CSR:
    """Sorts edges (E,) by their end ``at``, ties in the order of the list; ``other`` is their other end."""
    edge = torch.argsort(at, stable=True)
    counts = torch.zeros(num_nodes + 1, dtype=torch.int64, device=at.device)
    counts.scatter_add_(0, at.long() + 1, torch.ones_like(at, dtype=torch.int64))
    return CSR(counts.cumsum(0).int(), other[edge].int(), edge)


@dataclass
class Graph:
    """One graph, or several as one disjoint union.

    Edge e goes FROM ``src[e]`` TO ``dst[e]``: node dst[e] attends to node src[e]. Duplicate edges count twice, self
    loops are edges like others.

    Args:
        src, dst: (E,) integers, nodes in 0 .. num_nodes - 1.
        num_nodes: number of nodes N.
        graph_id: (N,) integers, the graph of each node in 0 .. num_graphs - 1, sorted or not; None where there is one.
        num_graphs: number of graphs.
    """

    src: torch.Tensor
    dst: torch.Tensor
    num_nodes: int
    graph_id: torch.Tensor | None = None
    num_graphs: int = 1
    _sorted: dict[str, CSR] = field(default_factory=dict, repr=False, compare=False)

    def incoming(self) -> CSR:
        """Edges by destination, sorted once."""
        if "in" not in self._sorted:
            self._sorted["in"] = to_csr(self.dst, self.src, self.num_nodes)
        return self._sorted["in"]

    def outgoing(self) -> CSR:
        """Edges by source, sorted once."""
        if "out" not in self._sorted:
            self._sorted["out"] = to_csr(self.src, self.dst, self.num_nodes)
        return self._sorted["out"]

    def to(self, device: torch.device | str) -> "Graph":
        ids = None if self.graph_id is None else self.graph_id.to(device)
        return Graph(self.src.to(device), self.dst.to(device), self.num_nodes, ids, self.num_graphs)


def as_graph(graph: Any, num_nodes: int) -> Graph:
    """A :class:`Graph` of what a caller may hand over.

    Args:
        graph: a Graph; a PyTorch Geometric ``Data`` or ``Batch`` (anything with an ``edge_index``); a tensor (2, E) of
            sources and destinations; a pair (src, dst), or a triple with the graph of each node.
        num_nodes: number of nodes that the features have.

    Raises:
        TypeError: for anything else.
        ValueError: where shapes, types or the number of nodes disagree.
    """
    if isinstance(graph, Graph):
        result = graph
    elif hasattr(graph, "edge_index"):
        ids = getattr(graph, "batch", None)
        count = getattr(graph, "num_graphs", None)
        result = make_graph(*graph.edge_index, num_nodes, ids, 1 if ids is None else count)
    elif isinstance(graph, torch.Tensor) and graph.ndim == 2 and graph.shape[0] == 2:
        result = make_graph(graph[0], graph[1], num_nodes)
    elif isinstance(graph, tuple | list) and len(graph) in (2, 3) and all(isinstance(t, torch.Tensor) for t in graph):
        result = make_graph(graph[0], graph[1], num_nodes, graph[2] if len(graph) == 3 else None)
    else:
        kind = f"tensor of shape {tuple(graph.shape)}" if isinstance(graph, torch.Tensor) else type(graph).__name__
        raise TypeError(f"no graph: {kind}; give a Graph, (src, dst), an edge_index (2, E) or an object that has one")
    if result.num_nodes != num_nodes:
        raise ValueError(f"the graph has {result.num_nodes} nodes, the features have {num_nodes}: give matching ones")
    return result


def make_graph(
    src: torch.Tensor,
    dst: torch.Tensor,
    num_nodes: int,
    graph_id: torch.Tensor | None = None,
    num_graphs: int | None = None,
) -> Graph:
    """A checked :class:`Graph`; what is not given is counted.

    Raises:
        ValueError: where src and dst are not integers of one shape (E,), or graph_id is not (N,). On a CPU also for
            nodes outside 0 .. num_nodes - 1; on a GPU that check would wait for it.
    """
    if src.shape != dst.shape or src.ndim != 1 or src.is_floating_point() or dst.is_floating_point():
        raise ValueError(
            f"src {tuple(src.shape)} {src.dtype} and dst {tuple(dst.shape)} {dst.dtype} are no edge list: "
            "give two integer tensors of one shape (E,)"
        )
    if graph_id is not None and graph_id.shape != (num_nodes,):
        raise ValueError(f"graph_id has shape {tuple(graph_id.shape)}, not ({num_nodes},): give one graph a node")
    if src.device.type == "cpu" and src.numel():
        low, high = min(src.min(), dst.min()).item(), max(src.max(), dst.max()).item()
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edges name nodes {low} to {high}, the graph has 0 to {num_nodes - 1}: renumber them")
    if num_graphs is None:
        num_graphs = 1 if graph_id is None or not graph_id.numel() else int(graph_id.max()) + 1
    return Graph(src, dst, num_nodes, graph_id, num_graphs)


def full_graph(graph_id: torch.Tensor | None, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(src, dst) of the complete graph of each graph, without self loops (section 5.3's full-graph mode).

    Args:
        graph_id: (N,) graph of each node, or None for one graph; gives the device.
    """
    device = None if graph_id is None else graph_id.device
    node = torch.arange(num_nodes, device=device)
    same = node[:, None] != node[None]
    if graph_id is not None:
        same &= graph_id[:, None] == graph_id[None]
    src, dst = same.nonzero(as_tuple=True)
    return src, dst

"""Attention along the edges of graphs (Dwivedi & Bresson, arXiv 2012.09699), and encodings of nodes."""

from .api import can_run_triton, graph_attention
from .encodings import (
    arpack_laplacian_eigenvectors,
    degree_roles,
    grid_laplacian_basis,
    laplacian_eigenvectors,
    laplacian_encoding,
)
from .reference import edge_scores, edge_weights, graph_attention_reference, neighbour_attention_reference
from .structure import CSR, Graph, as_graph, full_graph, make_graph, to_csr

__all__ = [
    "CSR",
    "Graph",
    "arpack_laplacian_eigenvectors",
    "as_graph",
    "can_run_triton",
    "degree_roles",
    "edge_scores",
    "edge_weights",
    "full_graph",
    "graph_attention",
    "graph_attention_reference",
    "grid_laplacian_basis",
    "laplacian_eigenvectors",
    "laplacian_encoding",
    "make_graph",
    "neighbour_attention_reference",
    "to_csr",
]

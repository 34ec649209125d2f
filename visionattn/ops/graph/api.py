"""The public function of attention along edges: it checks its arguments and picks an implementation."""

import functools
import warnings

import torch

from .reference import EPSILON, graph_attention_reference
from .structure import Graph

BACKENDS = ("auto", "reference", "triton")


def can_run_triton(q: torch.Tensor, e: torch.Tensor | None = None) -> tuple[bool, str]:
    """Whether the kernels take a call, and the reason where they don't."""
    if e is not None:
        return False, "edge features are in the scores: only the reference returns those"
    if not q.is_cuda:
        return False, f"the kernels need a CUDA tensor, got one on {q.device}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the kernels take float32, float16 and bfloat16, got {q.dtype}"
    if q.shape[2] > 256:
        return False, f"the kernels take heads of at most 256 channels, got {q.shape[2]}"
    problem = _import_problem()
    return not problem, problem


@functools.cache
def _import_problem() -> str:
    try:
        from . import fused  # noqa: F401
    except Exception as error:  # a triton that is missing or does not fit this PyTorch
        return f"triton can't be imported ({type(error).__name__}: {error})"
    return ""


@functools.cache
def _report(problem: str) -> None:
    warnings.warn(f"graph_attention runs its reference, which is slower: {problem}", stacklevel=4)


def graph_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    graph: Graph,
    e: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of each node over its incoming edges (arXiv 2012.09699, eqs. 3 to 5 and 10 to 12).

    ``out_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` with ``w_ij = exp(clamp(q_i . k_j / sqrt(D), -5, 5))`` over the
    edges j -> i. With edge features the product is weighted by channel, ``sum_d q_id k_jd e_ijd / sqrt(D)``, and eps is
    1e-6; without, eps is 0. As released, but for a node without incoming edges: it gets 0 (the released layer without
    edge features divides 0 by 0 there).

    Args:
        q, k, v: (N, H, D), N nodes; float32, float64, float16 or bfloat16. Sums are float32 at least.
        graph: the edges.
        e: edge features (E, H, D), in the order of the graph's edge list.
        backend: ``'reference'``: eager PyTorch, anywhere, every edge's key and value in memory, adds by index (on a
            GPU atomically). ``'triton'``: kernels over sorted edges, nothing in memory for an edge, no atomic sums;
            without edge features, on CUDA (:func:`can_run_triton`). ``'auto'``: the kernels where they can run.

    Returns:
        Output (N, H, D), and with edge features their scores by channel (E, H, D), before sum and clamp, else None.

    Raises:
        ValueError: for shapes that disagree, an unknown backend, or ``'triton'`` where the kernels cannot run.
    """
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape or q.shape[0] != graph.num_nodes:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}: give three (N, H, D) with the graph's N={graph.num_nodes} nodes")
    if e is not None and e.shape != (graph.src.shape[0], *q.shape[1:]):
        raise ValueError(f"e is {tuple(e.shape)}: give one of {(graph.src.shape[0], *q.shape[1:])} for these edges")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    able, problem = can_run_triton(q, e) if backend != "reference" else (False, "")
    if backend == "triton" and not able:
        raise ValueError(f"backend='triton' can't run: {problem}; use 'auto' or 'reference'")
    if able:
        into, out_of = graph.incoming(), graph.outgoing()
        result = torch.ops.visionattn.graph_attention(
            q, k, v, into.start, into.neighbour, out_of.start, out_of.neighbour, 0.0
        )
        return result[0], None
    if q.is_cuda and e is None and backend == "auto":
        _report(problem)
    out, scores = graph_attention_reference(q, k, v, graph.src, graph.dst, e, EPSILON if e is not None else 0.0)
    return out, scores if e is not None else None

"""Encodings of a node's place: Laplacian eigenvectors, structural roles, and the closed form for grids."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .structure import Graph


def normalised_laplacian(src: torch.Tensor, dst: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """I - D^-1/2 A D^-1/2 of one graph, (N, N) float64, D = in-degrees, at least 1; A symmetrised where it is not."""
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float64, device=src.device)
    adjacency.index_put_((src.long(), dst.long()), adjacency.new_ones(()), accumulate=True)
    if not torch.equal(adjacency, adjacency.T):
        adjacency = torch.maximum(adjacency, adjacency.T)
    scale = adjacency.sum(0).clamp_min(1).rsqrt()
    return torch.eye(num_nodes, dtype=torch.float64, device=src.device) - scale[:, None] * adjacency * scale


def laplacian_eigenvectors(
    src: torch.Tensor, dst: torch.Tensor, num_nodes: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest non-trivial eigenvectors (N, k) and all eigenvalues (N,) of one graph, float64.

    Columns are eigenvectors 1 .. k in the order of their eigenvalues, of length 1, with any sign. Graphs of fewer than
    k + 1 nodes have fewer; zeros stand for them (the released code returns fewer columns).

    Directed graphs are taken as undirected: an edge either way is one.
    """
    values, vectors = torch.linalg.eigh(normalised_laplacian(src, dst, num_nodes))
    out = vectors.new_zeros(num_nodes, k)
    count = max(0, min(k, num_nodes - 1))
    out[:, :count] = vectors[:, 1 : 1 + count]
    return out, values


def arpack_laplacian_eigenvectors(
    src: torch.Tensor, dst: torch.Tensor, num_nodes: int, k: int, tol: float = 1e-2
) -> torch.Tensor:
    """The k smallest non-trivial eigenvectors (N, k) float64 of one graph as ARPACK finds them with a wide tolerance.

    The released code of arXiv 2012.09699 takes these for PATTERN and CLUSTER: ``eigs(L, k + 1, which='SR', tol=1e-2)``
    for a general matrix, real parts, in the order of their eigenvalues. Well separated eigenvectors are exact; where
    eigenvalues lie close together, some are mixtures of their neighbours, or are skipped and the next takes the column.
    The start vector is fixed for each N, so the same graph gives the same columns.

    Graphs of fewer than k + 3 nodes are too small for ARPACK and get the columns of :func:`laplacian_eigenvectors`, as
    do those where it does not converge.

    Raises:
        ImportError: where SciPy is not installed.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import ArpackNoConvergence, eigs
    except ImportError as e:
        raise ImportError(f"ARPACK's eigenvectors need SciPy ({e}): pip install -e '.[graph]'") from e
    if num_nodes >= k + 3:
        laplacian = csr_array(normalised_laplacian(src, dst, num_nodes).numpy())  # dense products would start threads
        start = np.random.default_rng(num_nodes).uniform(-1, 1, num_nodes)
        try:
            values, vectors = eigs(laplacian, k=k + 1, which="SR", tol=tol, v0=start)
            return torch.from_numpy(vectors[:, values.argsort()][:, 1:].real.copy())
        except ArpackNoConvergence:
            pass
    return laplacian_eigenvectors(src, dst, num_nodes, k)[0]


def laplacian_encoding(graph: Graph, k: int, threads: int = 1) -> torch.Tensor:
    """Laplacian encodings (N, k) float32 of every graph in a union, by LAPACK's eigh in float64, on the CPU.

    Args:
        k: number of eigenvectors (8 for ZINC, 2 for PATTERN, 10 for CLUSTER in the paper).
        threads: graphs that are solved at once.
    """
    ids = graph.graph_id.cpu() if graph.graph_id is not None else torch.zeros(graph.num_nodes, dtype=torch.int64)
    src, dst = graph.src.cpu(), graph.dst.cpu()
    nodes = ids.long().argsort(stable=True)
    counts = torch.bincount(ids.long(), minlength=graph.num_graphs)
    local = torch.empty_like(nodes)
    first = counts.cumsum(0) - counts
    local[nodes] = torch.arange(graph.num_nodes) - first[ids.long()[nodes]]
    edge_graph = ids.long()[src.long()]
    order = edge_graph.argsort(stable=True)
    edge_counts = torch.bincount(edge_graph, minlength=graph.num_graphs).tolist()
    sources, targets = local[src.long()[order]].split(edge_counts), local[dst.long()[order]].split(edge_counts)

    def solve(i: int) -> torch.Tensor:
        return laplacian_eigenvectors(sources[i], targets[i], int(counts[i]), k)[0].float()

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            columns = list(pool.map(solve, range(graph.num_graphs)))
    else:
        columns = [solve(i) for i in range(graph.num_graphs)]
    out = torch.empty(graph.num_nodes, k)
    out[nodes] = torch.cat(columns) if columns else out
    return out.to(graph.src.device)


def flip_signs(encoding: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Each column (of all graphs of the batch) by one random sign, as in training."""
    draw = torch.rand(encoding.shape[-1], generator=generator, device=encoding.device)
    return encoding * torch.where(draw >= 0.5, 1.0, -1.0).to(encoding.dtype)


def degree_roles(graph: Graph) -> torch.Tensor:
    """Structural roles (N,) int64 as the released code's Weisfeiler-Lehman loop leaves them, from 1 on in each graph.

    That loop ends before its second refinement, so a role is a function of the degree: the rank of the md5 digest of
    "1_1_..._1" (degree + 1 ones) among the digests in the graph. Edges count as undirected, parallel ones once.
    """
    N = graph.num_nodes
    src, dst = graph.src.cpu().long(), graph.dst.cpu().long()
    pairs = torch.cat([src * N + dst, dst * N + src]).unique()
    pairs = pairs[pairs // max(N, 1) != pairs % max(N, 1)]
    degree = torch.bincount(pairs // max(N, 1), minlength=N).tolist()
    ids = graph.graph_id.tolist() if graph.graph_id is not None else [0] * N
    digest = {d: hashlib.md5("_".join(["1"] * (d + 1)).encode(), usedforsecurity=False).hexdigest() for d in {*degree}}
    seen: dict[int, set[str]] = {}
    for i, d in zip(ids, degree, strict=True):
        seen.setdefault(i, set()).add(digest[d])
    rank = {i: {text: place for place, text in enumerate(sorted(texts), 1)} for i, texts in seen.items()}
    roles = [rank[i][digest[d]] for i, d in zip(ids, degree, strict=True)]
    return torch.tensor(roles, dtype=torch.int64, device=graph.src.device)


def grid_laplacian_basis(grid: tuple[int, int], k: int) -> torch.Tensor:
    """The k smoothest non-constant eigenvectors of a grid graph with 4 neighbours, in closed form: (H * W, k) float32.

    Column (a, b) is ``cos(pi a (y + 1/2) / H) cos(pi b (x + 1/2) / W)``, normed to length 1: an eigenvector of the
    grid's combinatorial Laplacian with eigenvalue ``4 - 2 cos(pi a / H) - 2 cos(pi b / W)``. Columns are sorted by it,
    ties by b, then a. A square grid has eigenvalues of multiplicity 2, where a solver returns any rotation of a pair;
    the closed form fixes it. Grids of fewer than k + 1 nodes get columns of zeros.
    """
    H, W = grid
    places = [(4 - 2 * math.cos(math.pi * a / H) - 2 * math.cos(math.pi * b / W), b, a)
              for a in range(H) for b in range(W)]  # fmt: skip
    # equal eigenvalues may come out a rounding apart: rounded, the order of a pair is the same on every machine
    chosen = sorted((round(value, 9), b, a) for value, b, a in places)[1 : k + 1]
    y = (torch.arange(H, dtype=torch.float64) + 0.5) * math.pi / H
    x = (torch.arange(W, dtype=torch.float64) + 0.5) * math.pi / W
    out = torch.zeros(H * W, k, dtype=torch.float64)
    for column, (_, b, a) in enumerate(chosen):
        wave = (torch.cos(a * y)[:, None] * torch.cos(b * x)[None]).flatten()
        out[:, column] = wave / wave.norm()
    return out.float()

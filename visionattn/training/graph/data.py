"""PATTERN and CLUSTER: graphs drawn from stochastic block models, packed into tensors, and batches of them.

The generators follow the published parameters of 'Benchmarking Graph Neural Networks' (arXiv 2003.00982, section 4 and
its code, as the graph transformer's paper uses them). They are other draws than the released files, of the same
distributions.
"""

import dataclasses
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from visionattn._files import atomic_write
from visionattn.ops.graph import CSR, Graph, arpack_laplacian_eigenvectors, laplacian_eigenvectors

from ..config import UserError

SIZES = {"pattern": (10000, 2000, 2000), "cluster": (10000, 1000, 1000)}
CLASSES = {"pattern": 2, "cluster": 6}
TYPES = {"pattern": 3, "cluster": 7}
SPLITS = ("train", "val", "test")
SOLVERS = ("exact", "arpack")
LOW, HIGH = 5, 35  # community and pattern sizes: LOW <= size < HIGH
NUM_PATTERNS = 100


@dataclasses.dataclass
class GraphSet:
    """Undirected graphs one after the other: nodes, then neighbours of each node, sorted, both directions stored.

    feature, label, degree: of nodes (N,); encoding: Laplacian eigenvectors (N, k); neighbour: (E,) numbers of nodes
    within their graph, less than 256; node_start, edge_start: (graphs + 1,) where each graph begins.
    """

    feature: torch.Tensor  # uint8
    label: torch.Tensor  # uint8
    encoding: torch.Tensor  # float32
    degree: torch.Tensor  # int16
    neighbour: torch.Tensor  # uint8
    node_start: torch.Tensor  # int64
    edge_start: torch.Tensor  # int64

    def __len__(self) -> int:
        return len(self.node_start) - 1

    def to(self, device: torch.device | str) -> "GraphSet":
        return GraphSet(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes and edges (both directions) of each graph."""
        return self.node_start.diff(), self.edge_start.diff()


@dataclasses.dataclass
class Batch:
    """A union of graphs, padded to a fixed size where ``valid`` is given (1 for nodes, 0 for padding)."""

    graph: Graph
    feature: torch.Tensor  # (M,) int64
    label: torch.Tensor  # (M,) int64, -100 for padding
    encoding: torch.Tensor  # (M, k)
    valid: torch.Tensor | None  # (M,) float32


def gather_batch(data: GraphSet, ids: torch.Tensor, nodes: int, edges: int, padded: bool) -> Batch:
    """Graphs ``ids`` of ``data`` as one batch of ``nodes`` nodes and ``edges`` edges, without a wait for the device.

    Args:
        ids: (B,) on data's device; -1 stands for no graph.
        nodes, edges: sizes of the batch; at least the sum of the graphs', exactly that where ``padded`` is False.
    """
    device = ids.device
    real = (ids >= 0).long()
    ids = ids.clamp_min(0)
    node_first, edge_first = data.node_start[ids], data.edge_start[ids]
    node_end = ((data.node_start[ids + 1] - node_first) * real).cumsum(0)
    edge_end = ((data.edge_start[ids + 1] - edge_first) * real).cumsum(0)
    node_off, edge_off = (torch.cat([end.new_zeros(1), end[:-1]]) for end in (node_end, edge_end))

    def places(count: int, end: torch.Tensor, first: torch.Tensor, off: torch.Tensor):
        position = torch.arange(count, device=device)
        of = torch.searchsorted(end, position, right=True).clamp_max(len(ids) - 1)
        inside = position < end[-1]
        return of, inside, torch.where(inside, first[of] + position - off[of], 0)

    _, inside, node = places(nodes, node_end, node_first, node_off)
    of, edge_inside, edge = places(edges, edge_end, edge_first, edge_off)
    degree = data.degree[node].long() * inside
    start = torch.cat([degree.new_zeros(1), degree.cumsum(0)]).int()
    neighbour = torch.where(edge_inside, data.neighbour[edge].long() + node_off[of], 0)
    if padded:
        dst = neighbour[:0]  # the kernels read sorted edges only
    else:
        dst = torch.repeat_interleave(torch.arange(nodes, device=device), degree, output_size=edges)
    csr = CSR(start, neighbour.int(), torch.arange(edges, device=device))
    # undirected, and each node's neighbours are sorted: incoming and outgoing edges are the same arrays
    graph = Graph(neighbour, dst, nodes, _sorted={"in": csr, "out": csr})
    label = torch.where(inside, data.label[node].long(), -100)
    return Batch(
        graph,
        data.feature[node].long(),
        label,
        data.encoding[node] * inside[:, None],
        inside.float() if padded else None,
    )


def cluster_graph(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(adjacency (n, n) bool, feature (n,), label (n,)): six communities, one labelled node in each."""
    label = np.repeat(np.arange(6), rng.integers(LOW, HIGH, 6))
    adjacency = _blocks(rng, label, 0.55, 0.25)
    feature = np.zeros(len(label), dtype=np.int64)
    for community in range(6):
        feature[rng.choice(np.flatnonzero(label == community))] = community + 1
    return _shuffled(rng, adjacency, feature, label)


def pattern(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(adjacency, feature) of a pattern to be found."""
    size = rng.integers(LOW, HIGH)
    return _blocks(rng, np.zeros(size), 0.5, 0.5), rng.integers(0, 3, size)


def pattern_graph(
    rng: np.random.Generator, instance: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of five communities and a pattern that is joined to all of them; label 1 on the pattern's nodes."""
    small, small_feature = instance
    community = np.repeat(np.arange(5), rng.integers(LOW, HIGH, 5))
    n, m = len(community), len(small_feature)
    adjacency = np.zeros((n + m, n + m), dtype=bool)
    adjacency[:n, :n] = _blocks(rng, community, 0.5, 0.35)
    adjacency[n:, n:] = small
    joined = rng.random((n, m)) < 0.5
    adjacency[:n, n:], adjacency[n:, :n] = joined, joined.T
    feature = np.concatenate([rng.integers(0, 3, n), small_feature])
    return _shuffled(rng, adjacency, feature, np.repeat([0, 1], [n, m]))


def _blocks(rng: np.random.Generator, community: np.ndarray, inside: float, between: float) -> np.ndarray:
    chance = np.where(community[:, None] == community, inside, between)
    upper = np.triu(rng.random(chance.shape) < chance, 1)
    return upper | upper.T


def _shuffled(rng, adjacency, feature, label):
    order = rng.permutation(len(label))
    return adjacency[np.ix_(order, order)], feature[order], label[order]


def _makers(name: str, seed: int, sizes: tuple[int, int, int]) -> list[list[Callable]]:
    """A function that draws it for each graph of each split; every graph has a generator of its own."""

    def rng(*place: int) -> np.random.Generator:
        return np.random.default_rng((seed, *place))

    if name == "cluster":
        return [[lambda s=s, i=i: cluster_graph(rng(1, s, i)) for i in range(sizes[s])] for s in range(3)]
    instances = [pattern(rng(0, p)) for p in range(NUM_PATTERNS)]
    # every pattern stands in the same share of each split
    return [
        [lambda s=s, i=i: pattern_graph(rng(1, s, i), instances[i % NUM_PATTERNS]) for i in range(sizes[s])]
        for s in range(3)
    ]


def pack(graphs: list[tuple], k: int, threads: int = 0, eigenvectors: str = "exact") -> GraphSet:
    """A GraphSet of functions that return (adjacency, feature, label), or of such triples.

    Args:
        k: eigenvectors.
        eigenvectors: ``'exact'``, by eigh; ``'arpack'``, :func:`~visionattn.ops.graph.arpack_laplacian_eigenvectors`.
    """
    threads = threads or (os.cpu_count() or 1)

    def one(graph):
        adjacency, feature, label = graph() if callable(graph) else graph
        n = len(label)
        if n > 256:
            raise UserError(f"a graph has {n} nodes: these sets hold graphs of at most 256.")
        node, neighbour = np.nonzero(adjacency)
        edges = (torch.from_numpy(node), torch.from_numpy(neighbour), n, k)
        if eigenvectors == "exact":
            encoding = laplacian_eigenvectors(*edges)[0].float()
        else:
            encoding = arpack_laplacian_eigenvectors(*edges).float()
        bytes_ = (torch.from_numpy(np.asarray(x, dtype=np.uint8)) for x in (feature, label, neighbour))
        return *bytes_, torch.from_numpy(adjacency.sum(1).astype(np.int16)), encoding

    inner = torch.get_num_threads()
    torch.set_num_threads(1)  # small problems: threads go to graphs instead
    try:
        if threads == 1:
            parts = [one(graph) for graph in graphs]
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(one, graphs))
    finally:
        torch.set_num_threads(inner)
    feature, label, neighbour, degree, encoding = (torch.cat(column) for column in zip(*parts, strict=True))
    starts = [torch.tensor([0] + [len(part[i]) for part in parts]).cumsum(0) for i in (0, 2)]
    return GraphSet(feature, label, encoding, degree, neighbour, *starts)


def _joined(parts: list[GraphSet]) -> GraphSet:
    """Sets one after the other."""
    columns = {}
    for field in (f.name for f in dataclasses.fields(GraphSet)):
        values = [getattr(part, field) for part in parts]
        if field.endswith("_start"):
            last = 0
            for i, value in enumerate(values):
                values[i] = value[i > 0 :] + last
                last += int(value[-1])
        columns[field] = torch.cat(values)
    return GraphSet(**columns)


def _part(name: str, seed: int, sizes: tuple, k: int, eigenvectors: str, split: int, first: int, last: int) -> dict:
    """Graphs first .. last of a split, packed, as arrays: what a process of its own makes."""
    graphs = _makers(name, seed, sizes)[split][first:last]
    return {key: value.numpy() for key, value in vars(pack(graphs, k, 1, eigenvectors)).items()}


def generate(
    name: str,
    seed: int = 41,
    sizes: tuple[int, int, int] | None = None,
    k: int | None = None,
    threads: int = 0,
    eigenvectors: str = "exact",
    processes: int = 0,
) -> dict[str, GraphSet]:
    """The three splits of ``'pattern'`` or ``'cluster'``.

    The same seed gives the same graphs anywhere, whatever the number of threads (numpy's default generator; signs of
    encodings are the solver's).

    Args:
        sizes: graphs of train, val and test; the published numbers by default.
        k: eigenvectors, 2 (PATTERN) or 10 (CLUSTER) by default.
        eigenvectors: ``'exact'`` or ``'arpack'``, see :func:`pack`.
        processes: forked, to share the work; 0 takes threads instead, which wait for Python's lock half of the time.
    """
    if name not in SIZES:
        raise UserError(f"dataset={name!r} is unknown: use {' or '.join(SIZES)}.")
    if eigenvectors not in SOLVERS:
        raise UserError(f"eigenvectors={eigenvectors!r} is unknown: use {' or '.join(SOLVERS)}.")
    k = k or {"pattern": 2, "cluster": 10}[name]
    sizes = tuple(sizes or SIZES[name])
    if not processes:
        makers = _makers(name, seed, sizes)
        return {split: pack(made, k, threads, eigenvectors) for split, made in zip(SPLITS, makers, strict=True)}
    step = -(-sum(sizes) // (4 * processes))
    work = [(i, first, min(first + step, n)) for i, n in enumerate(sizes) for first in range(0, n, step)]
    with warnings.catch_warnings(), ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: these touch no lock of theirs
        made = [pool.submit(_part, name, seed, sizes, k, eigenvectors, *place) for place in work]
        parts = [GraphSet(**{key: torch.from_numpy(value) for key, value in m.result().items()}) for m in made]
    of = [[part for part, (i, _, _) in zip(parts, work, strict=True) if i == split] for split in range(len(SPLITS))]
    return {split: _joined(those) for split, those in zip(SPLITS, of, strict=True)}


def load_or_generate(
    name: str,
    seed: int,
    folder: str | Path,
    sizes: tuple[int, int, int] | None = None,
    k: int | None = None,
    eigenvectors: str = "exact",
    processes: int = 0,
) -> dict[str, GraphSet]:
    """:func:`generate`, kept in a file of ``folder``; without a folder nothing is kept."""
    if not folder:
        return generate(name, seed, sizes, k, eigenvectors=eigenvectors, processes=processes)
    count = "-".join(map(str, sizes or SIZES[name])) if name in SIZES else ""
    solver = "" if eigenvectors == "exact" else f"-{eigenvectors}"
    path = Path(folder) / f"{name}-seed{seed}-{count}-k{k or 'default'}{solver}.pt"
    if path.is_file():
        stored = torch.load(path, weights_only=True)
        return {split: GraphSet(**tensors) for split, tensors in stored.items()}
    data = generate(name, seed, sizes, k, eigenvectors=eigenvectors, processes=processes)
    atomic_write(path, lambda f: torch.save({split: vars(graphs) for split, graphs in data.items()}, f))
    return data


def load_folder(name: str, folder: str | Path, k: int, eigenvectors: str = "exact") -> dict[str, GraphSet]:
    """The released graphs as PyTorch Geometric's ``GNNBenchmarkDataset`` stores them: ``PATTERN_train.pt`` and so on.

    Each file is a list of dictionaries with ``x`` (types, or one-hot), ``edge_index`` (2, E) and ``y``. The original
    pickles (``SBM_PATTERN.pkl``) hold DGL objects and code, and are refused by PyTorch's safe reader.

    Raises:
        UserError: where a file is absent or of another form.
    """
    data = {}
    for split in SPLITS:
        path = Path(folder) / f"{name.upper()}_{split}.pt"
        if not path.is_file():
            raise UserError(
                f"data_dir={folder} has no {path.name}: give a folder with {name.upper()}_{{train,val,test}}.pt."
            )
        try:
            stored = torch.load(path, weights_only=True)
            data[split] = pack([_from_dict(item) for item in stored], k, eigenvectors=eigenvectors)
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{path} is no list of graphs as tensors ({type(e).__name__}): see docs/graph.md.") from e
    return data


def _from_dict(item: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, n = item["x"], item["y"].reshape(-1), len(item["x"])
    feature = x.argmax(-1) if x.ndim == 2 and x.shape[1] > 1 else x.reshape(-1).long()
    adjacency = np.zeros((n, n), dtype=bool)
    src, dst = item["edge_index"].numpy()
    adjacency[src, dst] = adjacency[dst, src] = True
    return adjacency, feature.numpy(), y.numpy()


def statistics(data: GraphSet) -> dict[str, float]:
    """Mean nodes and edges (both directions) of a graph."""
    nodes, edges = data.sizes()
    return {"graphs": len(data), "nodes": nodes.float().mean().item(), "edges": edges.float().mean().item()}

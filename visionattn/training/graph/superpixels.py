"""Images as graphs of superpixels: the transform, a data set's graphs, and a small training loop for them.

'Benchmarking Graph Neural Networks' (arXiv 2003.00982) made MNIST and CIFAR10 graphs this way. Needs scikit-image.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from visionattn._files import atomic_write
from visionattn.layers.graph_transformer import GraphTransformerNet
from visionattn.ops.graph import Graph, make_graph

from ..config import UserError
from ..data import Digits

NEIGHBOURS = 8
# segments asked for, compactness, most segments: of the published sets
MNIST = dict(n_segments=95, compactness=0.25, limit=75)
CIFAR10 = dict(n_segments=200, compactness=10.0, limit=150)


@dataclasses.dataclass
class Superpixels:
    """One image: node features (N, channels + 2), edge features (E, 1), and edges src -> dst (E,) each."""

    feature: torch.Tensor
    weight: torch.Tensor
    src: torch.Tensor
    dst: torch.Tensor


class SuperpixelGraph:
    """Transform of an image to its graph of superpixels.

    Nodes are SLIC's segments with their mean intensity by channel and their centre of mass (row, column) over the
    image's side. Each has edges to the 8 most similar others, by ``A_ij = exp(-(|c_i - c_j| / sigma_i)^2)`` of the
    centres c, sigma_i the mean distance to the 8 nearest plus 1e-8, A made symmetric; A_ij is the edge's feature.
    Graphs of at most 9 nodes are complete. (The published code drops the most similar neighbour with today's numpy and
    mixes up the weights' order; this takes the 8 largest, with their weights.)

    Args:
        n_segments, compactness: of ``skimage.segmentation.slic``; n_segments is lowered by 1 until
        limit: no more than this many segments are found.
        seed: of the random order of the nodes; None keeps SLIC's order.

    Raises:
        UserError: where scikit-image is absent; in a call, for what is no image of bytes, grey or RGB.
    """

    def __init__(self, n_segments: int = 95, compactness: float = 0.25, limit: int = 75, seed: int | None = 0):
        try:
            from skimage.segmentation import slic
        except ImportError as e:
            raise UserError("superpixels need scikit-image: pip install -e '.[graph]'.") from e
        self.slic, self.n_segments, self.compactness, self.limit = slic, n_segments, compactness, limit
        self.rng = None if seed is None else np.random.default_rng(seed)

    def segments(self, image: np.ndarray) -> np.ndarray:
        """Segment of every pixel (H, W), from 0 on, of an image (H, W) or (H, W, 3) in 0 .. 1."""
        count = self.n_segments
        while True:
            channel_axis = -1 if image.ndim == 3 else None
            found = self.slic(
                image, n_segments=count, compactness=self.compactness, channel_axis=channel_axis, start_label=0
            )
            _, found = np.unique(found, return_inverse=True)
            found = found.reshape(image.shape[:2])
            if found.max() + 1 <= self.limit or count <= 1:
                return found
            count -= 1

    def __call__(self, image: Any) -> Superpixels:
        """The graph of a PIL image, or of an array (H, W) or (H, W, 3) of bytes."""
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.size == 0 or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
            raise UserError(
                f"an image of {pixels.dtype} {pixels.shape} makes no graph: give bytes (H, W) or (H, W, 3), "
                "a PIL image in mode L or RGB for example."
            )
        pixels = pixels / 255
        segment = self.segments(pixels)
        if self.rng is not None:
            segment = self.rng.permutation(segment.max() + 1)[segment]
        flat, count = segment.ravel(), np.bincount(segment.ravel())
        n = len(count)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.bincount(flat, values.ravel(), n) / count

        channels = [mean(pixels)] if pixels.ndim == 2 else [mean(pixels[..., c]) for c in range(pixels.shape[2])]
        rows, columns = np.indices(segment.shape)
        side = max(segment.shape)
        centre = np.stack([mean(rows / side), mean(columns / side)], 1)
        similarity = centre_similarity(centre)
        src, dst = nearest_edges(similarity)
        feature = np.concatenate([np.stack(channels, 1), centre], 1)
        return Superpixels(
            torch.from_numpy(feature).float(), torch.from_numpy(similarity[src, dst])[:, None].float(),
            torch.from_numpy(src), torch.from_numpy(dst),
        )  # fmt: skip


def centre_similarity(centre: np.ndarray) -> np.ndarray:
    """(n, n) similarity of centres (n, 2), symmetric, its diagonal 0."""
    n = len(centre)
    distance = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
    others = distance + np.where(np.eye(n, dtype=bool), np.inf, 0.0)
    nearest = np.sort(others, axis=1)[:, : min(NEIGHBOURS, n - 1)]
    sigma = nearest.sum(1) / NEIGHBOURS + 1e-8
    similarity = np.exp(-((distance / sigma[:, None]) ** 2))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 0.0)
    return similarity


def nearest_edges(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(src, dst): each node's edges to its 8 most similar others, or to all of at most 8 others."""
    n = len(similarity)
    k = min(NEIGHBOURS, n - 1)
    masked = np.where(np.eye(n, dtype=bool), -np.inf, similarity)
    dst = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    return np.repeat(np.arange(n), k), dst.ravel()


def collate(graphs: list[Superpixels]) -> tuple[Graph, torch.Tensor, torch.Tensor]:
    """One union of graphs of any sizes: (graph, node features, edge features)."""
    sizes = torch.tensor([len(g.feature) for g in graphs])
    first = (sizes.cumsum(0) - sizes).tolist()
    src = torch.cat([g.src + at for g, at in zip(graphs, first, strict=True)])
    dst = torch.cat([g.dst + at for g, at in zip(graphs, first, strict=True)])
    ids = torch.arange(len(graphs)).repeat_interleave(sizes)
    graph = make_graph(src, dst, int(sizes.sum()), ids, len(graphs))
    return graph, torch.cat([g.feature for g in graphs]), torch.cat([g.weight for g in graphs])


@dataclasses.dataclass
class SuperpixelConfig:
    """A run on scikit-learn's digits, enlarged; the defaults are the benchmark's 100k budget with fewer layers."""

    dataset: str = "superpixels"
    size: int = 24  # side in pixels that the 8 x 8 digits are enlarged to
    slic: dict = dataclasses.field(default_factory=lambda: dict(MNIST))
    net: dict = dataclasses.field(default_factory=dict)
    seed: int = 41
    batch_size: int = 64
    lr: float = 1e-3
    epochs: int = 20
    limit: int = 0  # images of either split; 0: all
    device: str = "auto"
    output: str = "runs/graph/superpixels"


def digit_graphs(cfg: SuperpixelConfig, train: bool) -> tuple[list[Superpixels], torch.Tensor]:
    """Graphs and labels of a split of the digits."""
    digits, transform = Digits(train), SuperpixelGraph(**cfg.slic, seed=cfg.seed)
    count = cfg.limit or len(digits)
    graphs = [transform(digits[i][0].resize((cfg.size, cfg.size), 2)) for i in range(min(count, len(digits)))]
    return graphs, torch.tensor(digits.labels[: len(graphs)])


def train_superpixels(cfg: SuperpixelConfig, log: Any = print) -> dict[str, Any]:
    """Trains a graph transformer with edge features; returns the result's row."""
    begin = time.perf_counter()
    device = torch.device(cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    sets = {train: digit_graphs(cfg, train) for train in (True, False)}
    nodes = sum(len(g.feature) for g in sets[True][0]) / len(sets[True][0])
    counts = f"{len(sets[True][0])} and {len(sets[False][0])} graphs of {nodes:.1f} nodes"
    log(f"{counts}: {time.perf_counter() - begin:.1f} s")
    torch.manual_seed(cfg.seed)
    net = GraphTransformerNet(**{**dict(in_dim=3, in_dim_edge=1, n_classes=10), **cfg.net}).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    steps = cfg.epochs * -(-len(sets[True][0]) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, steps)

    def run(train: bool, order: torch.Tensor) -> tuple[float, float]:
        graphs, labels = sets[train]
        net.train(train)
        loss_sum, right = 0.0, 0
        for ids in order.split(cfg.batch_size):
            graph, h, e = collate([graphs[i] for i in ids.tolist()])
            target = labels[ids].to(device)
            with torch.set_grad_enabled(train):
                scores = net(graph.to(device), h.to(device), e.to(device))
                loss = F.cross_entropy(scores, target)
            if train:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            loss_sum += loss.item() * len(ids)
            right += (scores.argmax(-1) == target).sum().item()
        return loss_sum / len(order), 100 * right / len(order)

    history = []
    for epoch in range(cfg.epochs):
        generator = torch.Generator().manual_seed(cfg.seed * 100003 + epoch)
        loss, accuracy = run(True, torch.randperm(len(sets[True][1]), generator=generator))
        test_loss, test_accuracy = run(False, torch.arange(len(sets[False][1])))
        history.append(
            dict(epoch=epoch, loss=loss, accuracy=accuracy, test_loss=test_loss, test_accuracy=test_accuracy)
        )
        log(" ".join(f"{k}={v:.5g}" for k, v in history[-1].items()))
    return dict(
        dataset="digits as superpixels", epochs=cfg.epochs, test_accuracy=history[-1]["test_accuracy"], nodes=nodes,
        parameters=sum(p.numel() for p in net.parameters()), seconds=round(time.perf_counter() - begin, 1),
        device=str(device), history=history,
    )  # fmt: skip


def run_superpixels(values: dict[str, Any], args: argparse.Namespace) -> int:
    """The command's part for ``dataset: superpixels``; runs are short, and start anew each time."""
    known = [f.name for f in dataclasses.fields(SuperpixelConfig)]
    for key in values:
        if key not in known:
            raise UserError(f"{key!r} is no option of a run on superpixels: known are {', '.join(known)}.")
    cfg = SuperpixelConfig(**values)
    result = train_superpixels(cfg, lambda line: print(line, flush=True))
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "history"}))
    return 0

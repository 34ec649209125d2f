"""Superpixel graphs: similarities, edges, unions, and (with scikit-image) the transform and a short run."""

import json

import numpy as np
import pytest
import torch

from tests.extras import require_extra
from visionattn.layers import GraphTransformerNet
from visionattn.training.config import UserError
from visionattn.training.graph.__main__ import main
from visionattn.training.graph.superpixels import (
    MNIST,
    SuperpixelGraph,
    Superpixels,
    centre_similarity,
    collate,
    nearest_edges,
)


def test_similarity_and_edges():
    """Pair by pair from the formula."""
    centre = np.random.default_rng(0).random((14, 2))
    similarity = centre_similarity(centre)
    distance = [[float(np.hypot(*(a - b))) for b in centre] for a in centre]
    sigma = [sum(sorted(row)[1:9]) / 8 + 1e-8 for row in distance]
    for i in range(14):
        for j in range(14):
            one = np.exp(-((distance[i][j] / sigma[i]) ** 2)), np.exp(-((distance[j][i] / sigma[j]) ** 2))
            assert similarity[i, j] == pytest.approx(0 if i == j else sum(one) / 2)
    src, dst = nearest_edges(similarity)
    for i in range(14):
        assert set(dst[src == i]) == set(np.argsort(-similarity[i])[:8])
        assert (similarity[i, dst[src == i]] > 0).all()


@pytest.mark.parametrize("n", [2, 9])
def test_small_graphs_are_complete(n):
    src, dst = nearest_edges(centre_similarity(np.random.default_rng(0).random((n, 2))))
    assert sorted(zip(src, dst, strict=True)) == [(i, j) for i in range(n) for j in range(n) if i != j]


def test_unions_of_several_sizes():
    rng = np.random.default_rng(0)
    graphs = []
    for n in (12, 3, 20):
        similarity = centre_similarity(rng.random((n, 2)))
        src, dst = nearest_edges(similarity)
        weight = torch.from_numpy(similarity[src, dst])[:, None].float()
        graphs.append(Superpixels(torch.rand(n, 3), weight, torch.from_numpy(src), torch.from_numpy(dst)))
    net = GraphTransformerNet(in_dim=3, in_dim_edge=1, n_classes=10, L=2, hidden_dim=16, n_heads=2).eval()
    together = net(*collate(graphs))
    for i, graph in enumerate(graphs):
        assert torch.allclose(net(*collate([graph])), together[i : i + 1], atol=1e-5)


def test_transform():
    require_extra("skimage", "graph")
    image = np.zeros((28, 28), dtype=np.uint8)
    image[6:20, 10:18] = 200
    graph = SuperpixelGraph(**MNIST, seed=None)(image)
    n = len(graph.feature)
    assert 9 < n <= 75 and len(graph.src) == 8 * n and graph.weight.shape == (8 * n, 1)
    segment = SuperpixelGraph(**MNIST).segments(image / 255)
    pixels = np.argwhere(segment == 3)
    expected = [image[segment == 3].mean() / 255, *(pixels.mean(0) / 28)]
    assert np.allclose(graph.feature[3], expected, atol=1e-6)
    shuffled = SuperpixelGraph(**MNIST, seed=1)(image)
    assert not torch.equal(shuffled.feature, graph.feature)
    assert torch.allclose(shuffled.feature.sum(0), graph.feature.sum(0), atol=1e-4)
    few = SuperpixelGraph(n_segments=95, compactness=0.25, limit=20, seed=None)(image)
    assert len(few.feature) <= 20
    colour = SuperpixelGraph(n_segments=50, compactness=10.0, limit=150)(np.stack([image] * 3, -1))
    assert colour.feature.shape[1] == 5
    for other in (image / 255, np.zeros((3, 28, 28), np.uint8), np.zeros((28, 28, 4), np.uint8), None):
        with pytest.raises(UserError, match="makes no graph: give bytes"):
            SuperpixelGraph()(other)


def test_command(tmp_path, capsys):
    require_extra("skimage", "graph")
    options = ["limit=30", "epochs=2", f"output={tmp_path}", "net={L: 1, hidden_dim: 8, n_heads: 2}", "device=cpu"]
    assert main(["--config", "configs/graph/superpixels_digits.yaml", *options]) == 0
    assert len(json.loads((tmp_path / "result.json").read_text())["history"]) == 2
    assert main(["--config", "configs/graph/superpixels_digits.yaml", "epoch=2"]) == 2
    assert "'epoch' is no option" in capsys.readouterr().err

"""Training on graphs: the generators, batches with and without padding, loss and accuracy, resumption, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from visionattn.ops.graph import arpack_laplacian_eigenvectors, laplacian_eigenvectors
from visionattn.ops.graph.encodings import normalised_laplacian
from visionattn.training.config import UserError
from visionattn.training.graph import data as graph_data
from visionattn.training.graph.__main__ import main
from visionattn.training.graph.data import (
    gather_batch,
    generate,
    load_folder,
    load_or_generate,
    pack,
    statistics,
)
from visionattn.training.graph.engine import (
    GraphTrainer,
    TrainConfig,
    balanced_accuracy,
    load_config,
    net_forward,
    save,
    weighted_loss,
)
from visionattn.training.graph.together import train_together

NET = dict(L=2, hidden_dim=16, out_dim=16, n_heads=4)


@pytest.fixture(scope="module")
def small():
    return {name: generate(name, seed=5, sizes=(24, 5, 5)) for name in ("pattern", "cluster")}


@pytest.mark.parametrize("name, nodes, edges", [("cluster", 116.9, 4283), ("pattern", 117.0, 6000)])
def test_generators_have_the_published_sizes(name, nodes, edges):
    """Means of 250 graphs; those of PATTERN depend on its 100 patterns."""
    makers = graph_data._makers(name, 3, (250, 0, 0))[0]
    drawn = [maker() for maker in makers]
    sizes = np.array([len(label) for _, _, label in drawn])
    degree = np.array([adjacency.sum() for adjacency, _, _ in drawn])
    assert abs(sizes.mean() - nodes) < 6 and abs(degree.mean() - edges) < 0.12 * edges
    assert all((a == a.T).all() and not a.diagonal().any() for a, _, _ in drawn)


def test_cluster_graph():
    adjacency, feature, label = graph_data.cluster_graph(np.random.default_rng(0))
    counts = np.bincount(label)
    assert len(counts) == 6 and counts.min() >= 5 and counts.max() < 35
    assert sorted(feature[feature > 0]) == [1, 2, 3, 4, 5, 6]
    assert (label[feature > 0] + 1 == feature[feature > 0]).all()
    same = label[:, None] == label
    densities = []
    for seed in range(30):
        adjacency, _, label = graph_data.cluster_graph(np.random.default_rng(seed))
        same = (label[:, None] == label) & ~np.eye(len(label), dtype=bool)
        densities.append((adjacency[same].mean(), adjacency[label[:, None] != label].mean()))
    assert np.allclose(np.mean(densities, 0), [0.55, 0.25], atol=0.015)
    assert (np.diff(label) != 0).sum() > 20  # shuffled


def test_pattern_graph():
    rng = np.random.default_rng(0)
    instance = graph_data.pattern(rng)
    small_adjacency, small_feature = instance
    joined, inside, size = [], [], len(small_feature)
    for _ in range(30):
        adjacency, feature, label = graph_data.pattern_graph(rng, instance)
        assert label.sum() == size and sorted(feature[label == 1]) == sorted(small_feature)
        assert adjacency[np.ix_(label == 1, label == 1)].sum() == small_adjacency.sum()
        joined.append(adjacency[np.ix_(label == 1, label == 0)].mean())
        inside.append(adjacency[np.ix_(label == 0, label == 0)].mean())
    assert abs(np.mean(joined) - 0.5) < 0.02 and 0.35 < np.mean(inside) < 0.42


def test_every_graph_has_its_own_seed(small):
    again = generate("cluster", seed=5, sizes=(3, 5, 1), threads=1)
    n, m = (int(s[3]) for s in (small["cluster"]["train"].node_start, small["cluster"]["train"].edge_start))
    assert torch.equal(again["train"].label, small["cluster"]["train"].label[:n])
    assert torch.equal(again["train"].neighbour, small["cluster"]["train"].neighbour[:m])
    assert torch.equal(again["val"].feature, small["cluster"]["val"].feature)
    assert not torch.equal(generate("cluster", seed=6, sizes=(3, 1, 1))["train"].label, again["train"].label)


def test_batches_are_unions(small):
    """Padded or not, in any order, with places left empty: nodes, edges and encodings of the graphs."""
    data = small["pattern"]["train"]
    ids = torch.tensor([7, 2, -1, 11])
    nodes, edges = (int(s[[7, 2, 11]].sum()) for s in data.sizes())
    plain = gather_batch(data, torch.tensor([7, 2, 11]), nodes, edges, False)
    padded = gather_batch(data, ids, nodes + 10, edges + 100, True)
    assert padded.valid.sum() == nodes and (padded.label[nodes:] == -100).all() and (padded.encoding[nodes:] == 0).all()
    for name in ("feature", "label", "encoding"):
        assert torch.equal(getattr(plain, name), getattr(padded, name)[:nodes])
    a, b = plain.graph.incoming(), padded.graph.incoming()
    assert torch.equal(a.start, b.start[: nodes + 1]) and (b.start[nodes:] == edges).all()
    assert torch.equal(a.neighbour, b.neighbour[:edges])
    off = 0
    for i in (7, 2, 11):
        at, end = int(data.node_start[i]), int(data.node_start[i + 1])
        assert torch.equal(plain.label[off : off + end - at].byte(), data.label[at:end])
        off += end - at
    # the sorted arrays are those of the edge list
    fresh = graph_data.Graph(plain.graph.src, plain.graph.dst, nodes)
    for got, expected in ((a, fresh.incoming()), (a, fresh.outgoing())):
        assert torch.equal(got.start, expected.start) and torch.equal(got.neighbour, expected.neighbour)


def test_forward_of_a_batch_is_the_net(small):
    trainer = GraphTrainer(TrainConfig(dataset="cluster", net=NET, batch_size=5, device="cpu"), small["cluster"])
    data = small["cluster"]["val"]
    batch = gather_batch(data, torch.arange(5), len(data.label), len(data.neighbour), False)
    out = net_forward(trainer.net.eval(), batch)
    expected = trainer.net(batch.graph, batch.feature, lap_pos_enc=batch.encoding)
    assert torch.allclose(out, expected, atol=1e-5)


def test_padding_changes_nothing_in_training(small):
    """Loss, gradients and running statistics of a padded batch are those of the plain one."""
    data, ids = small["cluster"]["val"], torch.arange(5)
    nodes, edges = len(data.label), len(data.neighbour)
    results = []
    for padded in (False, True):
        trainer = GraphTrainer(TrainConfig(dataset="cluster", net=NET, batch_size=5, device="cpu"), small["cluster"])
        net = trainer.net.double()
        batch = gather_batch(data, ids, nodes + 37 * padded, edges + 500 * padded, padded)
        batch.encoding = batch.encoding.double()
        if padded:  # the reference reads an edge list, which the kernels do without
            batch.valid = batch.valid.double()
            csr = batch.graph.incoming()
            dst = torch.repeat_interleave(torch.arange(nodes + 37), csr.start.diff().long())
            batch.graph = graph_data.Graph(csr.neighbour[:edges].long(), dst, nodes + 37)
        loss = weighted_loss(net_forward(net.train(), batch), batch.label)
        loss.backward()
        running = [m.running_var for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]
        results.append([loss.detach(), *(p.grad for p in net.parameters()), *running])
    for plain, padded in zip(*results, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-9, atol=1e-12)


def test_loss_and_accuracy():
    scores = torch.tensor([[2.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [9, 0, 9]], dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 0, -100])
    log_p = scores.log_softmax(-1)
    weight = [(4 - 2) / 4, (4 - 2) / 4]  # both classes have two of four nodes, the third none
    expected = -sum(weight[c] * log_p[i, c] for i, c in enumerate([0, 1, 1, 0])) / sum(weight * 2)
    assert torch.allclose(weighted_loss(scores, label), expected)
    assert balanced_accuracy(scores, label).item() == pytest.approx((100 + 50) / 2)
    rare = torch.tensor([0, 0, 0, 1])
    nll = -log_p[:4].gather(1, rare[:, None]).flatten()
    w = torch.tensor([0.25, 0.25, 0.25, 0.75], dtype=torch.float64)
    assert torch.allclose(weighted_loss(scores[:4], rare), (w * nll).sum() / w.sum())


def test_it_learns(small):
    cfg = TrainConfig(dataset="cluster", net=NET, batch_size=8, lr=2e-2, device="cpu")
    trainer = GraphTrainer(cfg, small["cluster"])
    first = trainer.train_epoch()["loss"]
    for _ in range(20):
        last = trainer.train_epoch()
        trainer.epoch += 1
    assert last["loss"] < 0.85 * first and last["accuracy"] > 30  # chance is 17


def test_resumed_run_is_the_uninterrupted_one(small, tmp_path):
    cfg = TrainConfig(dataset="pattern", net=NET, batch_size=8, epochs=4, patience=0, factor=0.5, lr=2e-2, device="cpu")
    whole = GraphTrainer(cfg, small["pattern"])
    assert whole.fit(log=lambda line: None)
    part = GraphTrainer(TrainConfig(**{**vars(cfg), "epochs": 2}), small["pattern"])
    part.fit(log=lambda line: None)
    save(part, tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_size < 16 * 2**20
    torch.manual_seed(99)
    rest = GraphTrainer(cfg, small["pattern"])
    rest.load(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    rest.fit(log=lambda line: None)
    assert [r["val_loss"] for r in rest.history] == [r["val_loss"] for r in whole.history] and rest.lr == whole.lr
    assert all(torch.equal(a, b) for a, b in zip(rest.net.parameters(), whole.net.parameters(), strict=True))
    with pytest.raises(UserError, match="differs in batch_size"):
        GraphTrainer(TrainConfig(**{**vars(cfg), "batch_size": 4}), small["pattern"]).load(rest.state())


def test_runs_at_once_are_the_runs_alone(small):
    """Two at the same time, one shorter than the other: the curves and weights of each alone; nets with dropout not."""

    def trainer(seed, epochs, **net):
        cfg = TrainConfig(dataset="cluster", net=NET | net, batch_size=8, seed=seed, epochs=epochs, device="cpu")
        return GraphTrainer(cfg, small["cluster"])

    recipes = [(1, 3), (2, 2)]
    alone = [trainer(*recipe) for recipe in recipes]
    for one in alone:
        one.fit(log=lambda line: None)
    together = [trainer(*recipe) for recipe in recipes]
    lines = []
    assert (
        train_together(together, log=lambda i, line: lines.append(i)) == [True, True]
        and sorted(lines) == [0] * 3 + [1] * 2
    )
    for a, b in zip(alone, together, strict=True):
        assert [row["val_loss"] for row in a.history] == [row["val_loss"] for row in b.history]
        assert all(torch.equal(x, y) for x, y in zip(a.net.parameters(), b.net.parameters(), strict=True))
    with pytest.raises(UserError, match="without dropout"):
        train_together([trainer(1, 1), trainer(2, 1, in_feat_dropout=0.1)])
    broken = trainer(1, 2)
    broken.evaluate = lambda split: {"loss": float("nan"), "accuracy": 0.0}
    other = trainer(2, 2)
    with pytest.raises(UserError, match="not a number"):
        train_together([broken, other])
    assert other.epoch == 2


def test_best_epoch(small, tmp_path):
    """The net of the epoch with the highest validation accuracy, also after a resumption; the last one stays."""
    cfg = TrainConfig(dataset="cluster", net=NET, batch_size=8, epochs=6, lr=2e-2, device="cpu")
    trainer = GraphTrainer(cfg, small["cluster"])
    trainer.fit(log=lambda line: None)
    accuracies = [row["val_accuracy"] for row in trainer.history]
    assert trainer.best["epoch"] == accuracies.index(max(accuracies))
    assert trainer.best["epoch"] < 5, "choose another seed: the last epoch is the best one here"
    save(trainer, tmp_path)
    again = GraphTrainer(cfg, small["cluster"])
    again.load(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert again.evaluate_best("val")["accuracy"] == pytest.approx(max(accuracies))
    assert again.evaluate("val")["accuracy"] == pytest.approx(accuracies[-1])
    before = {name: value.clone() for name, value in again.net.state_dict().items()}
    train = again.evaluate("train")  # running statistics, no sign flips, no update: as the paper's table has it
    assert again.evaluate("train") == train and train["accuracy"] != again.history[-1]["train_accuracy"]
    assert all(torch.equal(value, before[name]) for name, value in again.net.state_dict().items())


def test_arpack_eigenvectors():
    """Well separated eigenvectors are the exact ones; all are near the eigenspace of small eigenvalues; repeatable."""
    cosines = []
    for i in range(20):
        adjacency, _, label = graph_data.cluster_graph(np.random.default_rng(i))
        src, dst = (torch.from_numpy(x) for x in np.nonzero(adjacency))
        found = arpack_laplacian_eigenvectors(src, dst, len(label), 10)
        exact, values = laplacian_eigenvectors(src, dst, len(label), 10)
        assert found.shape == exact.shape and found.dtype == torch.float64
        assert torch.equal(found, arpack_laplacian_eigenvectors(src, dst, len(label), 10))
        assert torch.allclose(found.norm(dim=0), torch.ones(10, dtype=torch.float64), atol=1e-6)
        quotient = (found * (normalised_laplacian(src, dst, len(label)) @ found)).sum(0)
        assert (quotient >= values[1] - 1e-9).all() and (quotient - values[1:11] < 0.1).all()
        cosines.append((found * exact).sum(0).abs())
    mean = torch.stack(cosines).mean(0)
    assert (mean[:4] > 0.999).all() and mean[9] < 0.95  # the tenth is where the released code's differ
    few = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    assert torch.equal(arpack_laplacian_eigenvectors(*few, 3, 5), laplacian_eigenvectors(*few, 3, 5)[0])


def test_processes_make_what_threads_make():
    whole = generate("cluster", 5, (7, 3, 1), k=3, eigenvectors="arpack")
    shared = generate("cluster", 5, (7, 3, 1), k=3, eigenvectors="arpack", processes=2)
    for split, graphs in whole.items():
        for name, value in vars(graphs).items():
            other = getattr(shared[split], name)
            assert torch.equal(value, other) and value.dtype == other.dtype, (split, name)


def test_schedule_and_end(small, monkeypatch):
    cfg = TrainConfig(dataset="pattern", net=NET, batch_size=8, patience=1, lr=4e-6, min_lr=1e-6, device="cpu")
    trainer = GraphTrainer(cfg, small["pattern"])
    monkeypatch.setattr(trainer, "train_epoch", lambda: {"loss": 1.0, "accuracy": 1.0})
    monkeypatch.setattr(trainer, "evaluate", lambda split: {"loss": 1.0, "accuracy": 1.0})
    assert trainer.fit(log=lambda line: None)
    # one good epoch, then a cut after every second one without an improvement: 4, 2, 1, 0.5 in 1e-6
    assert [round(r["lr"] * 1e6, 3) for r in trainer.history] == [4, 4, 4, 2, 2, 1, 1]


def test_command(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset: pattern\nsizes: [8, 4, 4]\nbatch_size: 4\nnet: {{L: 1, hidden_dim: 8}}\nepochs: 2\n"
                      f"device: cpu\ncache: {tmp_path}/data\noutput: {tmp_path}/run\n")  # fmt: skip
    assert main(["--config", str(config)]) == 0
    assert main(["--config", str(config), "epochs=3"]) == 0
    assert "goes on after epoch 2" in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["epochs"] == 3 and 0 <= result["test_accuracy"] <= 100
    assert len(json.loads((tmp_path / "run/history.json").read_text())) == 3
    options = ["--run", "seed=1", "--run", "net.lap_pos_enc=false eigenvectors=arpack", "epochs=1"]
    assert main(["--config", str(config), *options]) == 0
    results = [json.loads((tmp_path / f"run-{name}/result.json").read_text())
               for name in ("seed=1", "net.lap_pos_enc=false-eigenvectors=arpack")]  # fmt: skip
    assert [r["lap_pos_enc"] for r in results] == [True, False] and results[0]["best_epoch"] == 0
    capsys.readouterr()
    for options, message in [
        (["epoch=3"], "'epoch' is no option"), (["lr=x"], "lr='x' is not a float"), (["dataset=zinc"], "is unknown"),
        (["eigenvectors=eigh"], "use exact or arpack"), (["--run", "seed=1", "--run", "seed=1"], "the same output"),
        (["batch_size"], "is not key=value"), (["lr=1e-3"], "differs in lr"), (["data_dir=/nowhere"], "has no PATTERN"),
    ]:  # fmt: skip
        assert main(["--config", str(config), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.parametrize("name, count", [("pattern", 522982), ("cluster", 524026)])
def test_published_configurations(name, count):
    cfg = load_config(yaml.safe_load(Path(f"configs/graph/{name}.yaml").read_text()))
    assert (cfg.lr, cfg.factor, cfg.patience, cfg.batch_size) == (5e-4, 0.5, 10, {"pattern": 26, "cluster": 32}[name])
    tiny = generate(name, sizes=(1, 1, 1))
    trainer = GraphTrainer(TrainConfig(**{**vars(cfg), "device": "cpu"}), tiny)
    assert sum(p.numel() for p in trainer.net.parameters()) == count


def test_released_graphs(tmp_path):
    """Files of PyTorch Geometric's benchmark sets, one-hot or not, give the graphs that they were made of."""
    drawn = [
        graph_data.pattern_graph(np.random.default_rng(i), graph_data.pattern(np.random.default_rng(9))) for i in (0, 1)
    ]
    for split in ("train", "val", "test"):
        items = [
            {"x": torch.nn.functional.one_hot(torch.from_numpy(f), 3).float(), "y": torch.from_numpy(y),
             "edge_index": torch.from_numpy(np.stack(np.nonzero(a))), "edge_attr": torch.ones(int(a.sum()), 1)}
            for a, f, y in drawn
        ]  # fmt: skip
        torch.save(items, tmp_path / f"PATTERN_{split}.pt")
    loaded, expected = load_folder("pattern", tmp_path, 2)["val"], pack(drawn, 2)
    for name in ("feature", "label", "neighbour", "degree", "node_start", "edge_start"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name))
    assert statistics(loaded)["graphs"] == 2
    (tmp_path / "PATTERN_test.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="is no list of graphs"):
        load_folder("pattern", tmp_path, 2)


def test_cache(tmp_path, monkeypatch):
    first = load_or_generate("cluster", 1, tmp_path, (2, 1, 1))
    monkeypatch.setattr(graph_data, "generate", lambda *args: pytest.fail("generated again"))
    second = load_or_generate("cluster", 1, tmp_path, (2, 1, 1))
    assert torch.equal(first["train"].encoding, second["train"].encoding)

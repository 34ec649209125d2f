"""The training loop of node classification on packed graphs.

On a GPU one step is one CUDA graph: the batch is gathered from sets that lie on the device, padded to a fixed size,
and forward, loss, backward and Adam follow without a launch from Python. Padding counts neither in batch norm, loss
nor accuracy, so a captured step computes what a plain one does.
"""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from visionattn._files import atomic_write
from visionattn.layers.graph_transformer import GraphTransformerLayer, GraphTransformerNet

from ..config import UserError
from .data import CLASSES, SOLVERS, SPLITS, TYPES, Batch, GraphSet, gather_batch


@dataclasses.dataclass
class TrainConfig:
    """One run; the defaults are the published recipe of PATTERN (arXiv 2012.09699, section 4.1 and released code)."""

    dataset: str = "pattern"  # pattern, cluster
    data_seed: int = 41  # of the generated graphs
    data_dir: str = ""  # released graphs instead, see docs/graph.md
    eigenvectors: str = "exact"  # exact, or arpack as the released code takes them
    cache: str = ""  # where generated graphs are kept; "" keeps none
    sizes: list[int] | None = None  # graphs of train, val and test; None: the published numbers
    net: dict = dataclasses.field(default_factory=dict)  # arguments of GraphTransformerNet
    seed: int = 41  # of weights, order and signs
    batch_size: int = 26
    lr: float = 5e-4
    factor: float = 0.5  # of lr, where the validation loss has not improved for more than `patience` epochs
    patience: int = 10
    min_lr: float = 1e-6  # the run ends below it
    epochs: int = 1000
    device: str = "auto"
    capture: bool | None = None  # one CUDA graph a step; None: on a GPU
    compile: bool = False  # torch.compile what follows attention in each layer
    output: str = "runs/graph/pattern"


def load_config(values: dict[str, Any]) -> TrainConfig:
    """A TrainConfig of a YAML file's values. Raises UserError for an unknown key or a value of another kind."""
    known = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{key!r} is no option of a graph run: known are {', '.join(known)}.")
        default = known[key].default
        if value is None and isinstance(default, str):
            values = values | {key: ""}
        elif isinstance(default, bool | int | float | str):
            if isinstance(default, float) and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
                with contextlib.suppress(ValueError):
                    value = float(value)
                    values = values | {key: value}
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
                raise UserError(f"{key}={value!r} is not a {type(default).__name__}.")
    cfg = TrainConfig(**{k: float(v) if isinstance(known[k].default, float) else v for k, v in values.items()})
    if cfg.dataset not in CLASSES:
        raise UserError(f"dataset={cfg.dataset!r} is unknown: use {' or '.join(CLASSES)}.")
    if cfg.eigenvectors not in SOLVERS:
        raise UserError(f"eigenvectors={cfg.eigenvectors!r} is unknown: use {' or '.join(SOLVERS)}.")
    if cfg.batch_size < 1 or cfg.epochs < 1 or cfg.lr <= 0 or not 0 < cfg.factor < 1 or cfg.patience < 0:
        raise UserError("batch_size and epochs have to be 1 at least, lr positive, factor between 0 and 1.")
    return cfg


def weighted_loss(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross entropy (M, C), (M,) with weights (V - n_c) / V of each class c in the batch, 0 where n_c is 0.

    Labels -100 are padding; V counts the others.
    """
    classes = torch.arange(scores.shape[1], device=label.device)
    count = (label[:, None] == classes).sum(0)
    total = count.sum()
    weight = ((total - count) / total * (count > 0)).to(scores.dtype)
    return F.cross_entropy(scores, label, weight, ignore_index=-100)


def balanced_accuracy(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean recall, in percent, of the classes that are present; labels -100 are padding."""
    classes = torch.arange(scores.shape[1], device=label.device)
    of_class = label[:, None] == classes
    count = of_class.sum(0)
    right = (of_class & (scores.argmax(-1) == label)[:, None]).sum(0)
    return 100 * (right / count.clamp_min(1)).sum() / (count > 0).sum()


def net_forward(net: GraphTransformerNet, batch: Batch, update: Any = GraphTransformerLayer.update) -> torch.Tensor:
    """The net's scores of a padded batch. Equals ``net(...)``, but that padding is left out of batch norm."""
    types = net.embedding_h.num_embeddings
    one_hot = F.one_hot(batch.feature, types) if not batch.feature.is_cuda else (
        batch.feature[:, None] == torch.arange(types, device=batch.feature.device)
    )  # fmt: skip
    h = one_hot.to(batch.encoding.dtype) @ net.embedding_h.weight  # the gradient of a lookup is not for CUDA graphs
    if net.lap_pos_enc:
        h = h + net.embedding_lap_pos_enc(batch.encoding)
    h = net.in_feat_dropout(h)
    for layer in net.layers:
        attended, _ = layer.attention(h, batch.graph)
        h = update(layer, h, attended, "", batch.valid)
    return net.MLP_layer(h)


class GraphTrainer:
    """Trains and evaluates; holds all state that a checkpoint needs.

    Args:
        cfg: the run.
        data: ``train``, ``val`` and ``test``.
    """

    def __init__(self, cfg: TrainConfig, data: dict[str, GraphSet]):
        name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.cfg, self.device = cfg, torch.device(name)
        self.data = {split: data[split].to(self.device) for split in SPLITS}
        self.sizes = {split: data[split].sizes() for split in SPLITS}  # stay on the CPU
        k = data["train"].encoding.shape[1]
        defaults = dict(in_dim=TYPES[cfg.dataset], n_classes=CLASSES[cfg.dataset], lap_pos_enc=True, pos_enc_dim=k)
        torch.manual_seed(cfg.seed)
        self.net = GraphTransformerNet(**{**defaults, **cfg.net}).to(self.device)
        if self.net.task != "nodes" or self.net.wl_pos_enc or self.net.full_graph:
            raise UserError(
                "net: this command trains node classification on sparse graphs, with lap_pos_enc or without."
            )
        if self.net.lap_pos_enc and self.net.pos_enc_dim != k:
            raise UserError(f"net: pos_enc_dim={self.net.pos_enc_dim}, but the graphs have {k} eigenvectors.")
        on_gpu = self.device.type == "cuda"
        self.capture = on_gpu if cfg.capture is None else cfg.capture
        if self.capture and not on_gpu:
            raise UserError(f"capture needs a CUDA device, got {self.device}: set capture to null.")
        lr = torch.tensor(cfg.lr, device=self.device) if on_gpu else cfg.lr
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, capturable=on_gpu)
        # torch's schedule steps a stand-in: it would replace the tensor that a CUDA graph reads lr from
        self._stand_in = torch.optim.SGD([torch.zeros(1)], lr=cfg.lr)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._stand_in, mode="min", factor=cfg.factor, patience=cfg.patience
        )
        self.epoch, self.history, self.seconds = 0, [], 0.0
        self.mid_epoch = False  # True: interrupted between two epochs' states, not to be saved
        self.best: dict[str, Any] | None = None  # epoch, val_accuracy and net (on the CPU) of the best one on val
        self.update = GraphTransformerLayer.update
        self.padded_update = torch.compile(self.update, dynamic=False) if cfg.compile else self.update
        self._graphs: dict[str, Any] = {}

    @property
    def lr(self) -> float:
        return self._stand_in.param_groups[0]["lr"]

    def _order(self, split: str, generator: torch.Generator | None) -> torch.Tensor:
        """(batches, batch_size) of graphs; -1 fills the last one up."""
        n, size = len(self.data[split]), self.cfg.batch_size
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        return F.pad(order, (0, -n % size), value=-1).reshape(-1, size)

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """Nodes and edges of a padded batch: all of val's and test's fit, and of train's all but one in millions."""
        found = []
        for axis, unit in ((0, 64), (1, 1024)):
            size = self.sizes["train"][axis].double()
            most = min(size.mean() * self.cfg.batch_size + 6 * size.std(correction=0) * self.cfg.batch_size**0.5,
                       size.topk(min(len(size), self.cfg.batch_size)).values.sum())  # fmt: skip
            for split in ("val", "test"):
                most = max(most, self._totals(split, self._order(split, None))[axis].max())
            found.append(-(-int(most) // unit) * unit)
        return found[0], found[1]

    def _totals(self, split: str, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes and edges of each batch of an order."""
        real = order >= 0
        nodes, edges = ((size[order.clamp_min(0)] * real).sum(1) for size in self.sizes[split])
        return nodes, edges

    def _compute(self, split: str, ids, signs, size: tuple[int, int], padded: bool):
        batch = gather_batch(self.data[split], ids, *size, padded)
        if self.net.training:
            batch.encoding = batch.encoding * signs
        scores = net_forward(self.net, batch, self.padded_update if padded else self.update)
        return weighted_loss(scores, batch.label), balanced_accuracy(scores, batch.label)

    def _step(self, split: str, ids, signs, size: tuple[int, int], padded: bool, sums: torch.Tensor) -> None:
        """One batch, and in train mode one update; adds loss and accuracy to ``sums`` (2,)."""
        if self.net.training:
            loss, accuracy = self._compute(split, ids, signs, size, padded)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        else:
            with torch.no_grad():
                loss, accuracy = self._compute(split, ids, signs, size, padded)
        sums += torch.stack([loss.detach(), accuracy.float()])

    def _captured(self, split: str):
        """(replay, ids, signs, sums): the step of a split, in the net's mode, as a CUDA graph over fixed tensors."""
        key = split, self.net.training
        if key in self._graphs:
            return self._graphs[key]
        ids = self._order(split, None)[0].to(self.device)
        signs = torch.ones(self.data[split].encoding.shape[1], device=self.device)
        sums = torch.zeros(2, device=self.device)
        fixed = (split, ids, signs, self.bounds, True, sums)
        keep = {k: v.clone() for k, v in self.net.state_dict().items()}
        moments = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimizer.state.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels, and makes Adam's tensors
                self._step(*fixed)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(*fixed)
        with torch.no_grad():  # in place: the graph reads these tensors
            for k, v in self.net.state_dict().items():
                v.copy_(keep[k])
            for p, state in self.optimizer.state.items():
                for k, v in state.items():
                    v.copy_(moments[p][k]) if p in moments else v.zero_()
        sums.zero_()
        self._graphs[key] = (graph.replay, ids, signs, sums)
        return self._graphs[key]

    def prepare(self) -> None:
        """Captures the steps now rather than when they are first needed: nothing else may use the device meanwhile."""
        for split in SPLITS if self.capture else ():
            self.net.train(split == "train")
            self._captured(split)

    def _run(self, split: str, generator: torch.Generator | None) -> dict[str, float]:
        self.net.train(generator is not None)
        order = self._order(split, generator)
        totals = torch.stack(self._totals(split, order), 1).tolist()
        k = self.data[split].encoding.shape[1]
        draw = torch.rand(len(order), k, generator=generator) if generator is not None else torch.ones(len(order), k)
        all_signs = torch.where(draw >= 0.5, 1.0, -1.0).to(self.device)
        all_ids = order.to(self.device)
        sums = torch.zeros(2, device=self.device)
        if self.capture:
            replay, ids, signs, captured_sums = self._captured(split)
        for i, size in enumerate(totals):
            if self.capture and all(a <= b for a, b in zip(size, self.bounds, strict=True)):
                ids.copy_(all_ids[i])
                signs.copy_(all_signs[i])
                replay()
            else:
                self._step(split, all_ids[i], all_signs[i], tuple(size), False, sums)
        if self.capture:
            sums += captured_sums
            captured_sums.zero_()
        loss, accuracy = (sums / len(order)).tolist()
        return {"loss": loss, "accuracy": accuracy}

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training graphs: mean loss and accuracy of its batches, as they were trained."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr
        generator = torch.Generator().manual_seed(self.cfg.seed * 100003 + self.epoch)
        return self._run("train", generator)

    def evaluate(self, split: str) -> dict[str, float]:
        """Mean loss and accuracy of the batches of a split, unshuffled, at the training batch size, without updates."""
        return self._run(split, None)

    def evaluate_best(self, split: str) -> dict[str, float]:
        """:meth:`evaluate` of the net as it was after the epoch with the highest validation accuracy."""
        assert self.best is not None, "no epoch was trained"
        last = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(self.best["net"])
        try:
            return self.evaluate(split)
        finally:
            self.net.load_state_dict(last)

    def fit(self, max_seconds: float = 0.0, log: Any = print, stop: threading.Event | None = None) -> bool:
        """Trains until the recipe ends, or for about ``max_seconds``, or till ``stop``; True where the recipe ended."""
        begin, longest = time.perf_counter(), 0.0
        while not self.finished:
            start = time.perf_counter()
            if stop is not None and stop.is_set():
                return False
            if max_seconds and start - begin + longest > max_seconds:
                return False
            self.mid_epoch = True
            train, val = self.train_epoch(), self.evaluate("val")
            row = {"epoch": self.epoch, "lr": self.lr, "train_loss": train["loss"], "train_accuracy": train["accuracy"]}
            row |= {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}
            if self.best is None or val["accuracy"] > self.best["val_accuracy"]:
                net = {name: value.cpu().clone() for name, value in self.net.state_dict().items()}
                self.best = {"epoch": self.epoch, "val_accuracy": val["accuracy"], "net": net}
            self.schedule.step(val["loss"])
            self.epoch += 1
            seconds = time.perf_counter() - start
            self.seconds += seconds
            longest = max(longest, seconds) if len(self.history) else 0.0
            row["seconds"] = round(seconds, 3)
            self.history.append(row)
            self.mid_epoch = False
            log(" ".join(f"{k}={v:.6g}" for k, v in row.items()))
            if val["loss"] != val["loss"]:
                raise UserError(f"the validation loss is not a number after epoch {self.epoch}: lower lr.")
        return True

    @property
    def finished(self) -> bool:
        return self.epoch >= self.cfg.epochs or self.lr < self.cfg.min_lr

    def state(self) -> dict[str, Any]:
        """Everything a run goes on from: tensors and plain values."""
        return {
            "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "lr": self.lr, "epoch": self.epoch, "history": self.history,
            "seconds": self.seconds, "best": self.best, "config": dataclasses.asdict(self.cfg),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state`; before the first epoch, since a captured step keeps its tensors.

        Raises:
            UserError: for the state of a run with other graphs, net, seed or recipe.
        """
        assert not self._graphs, "load a state before the first epoch"
        mine = dataclasses.asdict(self.cfg)
        free = {"device", "capture", "compile", "output", "cache", "epochs"}
        theirs = dataclasses.asdict(TrainConfig()) | state["config"]  # older files lack newer options
        other = [key for key in mine if key not in free and theirs[key] != mine[key]]
        if other:
            raise UserError(
                f"the checkpoint's run differs in {', '.join(other)}: choose another output, or its config."
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._stand_in.param_groups[0]["lr"] = state["lr"]
        self.epoch, self.history, self.seconds = state["epoch"], state["history"], state["seconds"]
        self.best = state.get("best")


def save(trainer: GraphTrainer, folder: Path) -> None:
    """``checkpoint.pt`` (about 8 MB for the paper's nets) and ``history.json``, each written whole."""
    state = trainer.state()
    atomic_write(folder / "checkpoint.pt", lambda f: torch.save(state, f))
    atomic_write(folder / "history.json", json.dumps(trainer.history, indent=0))

"""What a run tells: progress lines, summary.csv, curves.png, TensorBoard, Weights & Biases."""

import csv
import importlib.util
import io
import time
from pathlib import Path
from typing import Any

from visionattn._files import atomic_write

from .config import Config, UserError

CURVES_EVERY = 60.0  # seconds between redrawings of curves.png (drawing takes a good part of a second)


def check_loggers(cfg: Config) -> None:
    """Raises UserError for a logger that was asked for and is not installed."""
    for option, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if getattr(cfg, option) and importlib.util.find_spec(package) is None:
            raise UserError(f"{option} is not installed here: pip install {package}, or leave --{option} out.")


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Reporter:
    """Writes into one run folder. ``history`` (a list of flat dicts, one an epoch) is the source of every file."""

    def __init__(self, cfg: Config, run: Path):
        self.run, self.drawn = run, 0.0
        self.tensorboard = self.wandb = None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run))
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(project="visionattn", name=run.name, dir=str(run), config=vars(cfg), resume="allow",
                                    id=run.name)  # fmt: skip

    def epoch(self, history: list[dict[str, Any]], last: bool) -> None:
        """An epoch's row has been added to the history."""
        write_summary(self.run / "summary.csv", history)
        row = {k: v for k, v in history[-1].items() if v is not None}
        if self.tensorboard:
            for key, value in row.items():
                self.tensorboard.add_scalar(key, value, row["epoch"])
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(row, step=row["epoch"])
        if last or time.monotonic() - self.drawn > CURVES_EVERY:
            draw_curves(self.run / "curves.png", history)
            self.drawn = time.monotonic()

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def write_summary(path: Path, history: list[dict[str, Any]]) -> None:
    """The whole history as CSV, so that a resumed run never holds a row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(k for row in history for k in row)))
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, text.getvalue())


def draw_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Loss and accuracy over the epochs."""
    from matplotlib.figure import Figure  # not pyplot: no backend, no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, keys, label in (
        (left, ("train_loss", "eval_loss", "ema_loss"), "loss"),
        (right, ("eval_top1", "ema_top1"), "top-1 accuracy, %"),
    ):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else "")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=100))

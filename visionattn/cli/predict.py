"""``predict``: the likeliest classes of images, with a picture."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .images import add_arguments, read_images, subject

SHOWN = 8  # images in the picture


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("predict", parents=[common], help="the likeliest classes of images, with a picture")
    add_arguments(p, many=True)
    p.add_argument("--top", type=int, default=5, help="classes of an image")
    p.set_defaults(run=predict)


@dataclass
class Predictions:
    """Classes of every image; prints as lines, and as JSON."""

    model: str
    weights: str
    picture: str
    images: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return vars(self)

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.weights})"]
        for entry in self.images:
            lines.append(entry["image"])
            lines += [f"  {c['probability']:.4f}  {c['label']}" for c in entry["classes"]]
        return "\n".join([*lines, f"picture: {self.picture}"])


def predict(args: argparse.Namespace) -> Predictions:
    import torch

    from visionattn.plots.maps import classes_figure, save

    if args.top < 1:
        raise ValueError(f"--top {args.top}: show at least one class")
    found = subject(args)
    if not getattr(found.model, "num_classes", 0):
        raise ValueError(f"{found.name} has no classes to predict")
    images = read_images(args, found)
    entries, rows = [], []
    for i, (name, image) in enumerate(images):
        if sys.stderr.isatty() and len(images) > 1:
            print(f"\r{i + 1} of {len(images)}", end="\n" if i + 1 == len(images) else "", file=sys.stderr, flush=True)
        x = found.tensor(image)
        with torch.no_grad():
            scores = found.model(x)[0].float().softmax(dim=0)
        top = scores.topk(min(args.top, len(scores)))
        classes = [
            {"label": found.label(c), "index": c, "probability": round(p, 6)}
            for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        entries.append({"image": name, "classes": classes})
        if len(rows) < SHOWN:
            rows.append((name, found.shown(x), [(c["label"], c["probability"]) for c in classes]))
    path = Path(args.out) / f"{found.name}-{images[0][0]}-predict.png"
    save(classes_figure(rows, found.title), path)
    return Predictions(found.name, found.weights, str(path), entries)

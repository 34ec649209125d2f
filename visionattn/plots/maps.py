"""Attention on a photograph: overlays, a query's rows, and classes with their probabilities."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn._files import atomic_write

PANEL = 2.4  # inches of a panel's side


def overlay(axis: Any, image: np.ndarray, heat: np.ndarray, signed: bool = False, alpha: float = 0.6) -> None:
    """Draws a map of any size over an image.

    Args:
        axis: of matplotlib.
        image: (H, W, 3) in [0, 1].
        heat: (h, w), stretched over the image; colours go from its smallest value to its largest.
        signed: blue below zero, red above, white at zero.
    """
    side = (0, image.shape[1], image.shape[0], 0)
    grey = image.mean(axis=2)
    axis.imshow(grey, extent=side, cmap="gray", vmin=0, vmax=1)
    bound = float(np.abs(heat).max()) or 1.0
    colours = dict(cmap="RdBu_r", vmin=-bound, vmax=bound) if signed else dict(cmap="inferno")
    axis.imshow(heat, extent=side, alpha=alpha, interpolation="nearest", **colours)
    axis.set_xticks([])
    axis.set_yticks([])


def grid_of(panels: int, title: str, width: int = 4) -> tuple[Any, list]:
    """A figure and the axes of its panels, row by row."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    columns = min(width, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(columns * PANEL, 2 * PANEL), rows * (PANEL + 0.4) + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[panels:]:
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure, axes[:panels]


def maps_figure(
    image: np.ndarray,
    panels: Sequence[tuple[str, np.ndarray, bool]],
    title: str,
    point: tuple[float, float] | None = None,
) -> Any:
    """The image, and a panel for each (label, map (h, w), signed).

    Args:
        point: (y, x) in [0, 1) of a query, which is marked in every panel.
    """
    figure, axes = grid_of(len(panels) + 1, title)
    axes[0].imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes[0].set_title("input", fontsize=8)
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    for axis, (label, heat, signed) in zip(axes[1:], panels, strict=True):
        overlay(axis, image, heat, signed)
        axis.set_title(f"{label}\n{heat.min():.2g} to {heat.max():.2g}", fontsize=7)
    if point is not None:
        y, x = point[0] * image.shape[0], point[1] * image.shape[1]
        for axis in axes:
            axis.plot([x], [y], "o", markersize=7, markerfacecolor="none", markeredgecolor="cyan", markeredgewidth=1.5)
    return figure


def classes_figure(rows: Sequence[tuple[str, np.ndarray, Sequence[tuple[str, float]]]], title: str) -> Any:
    """A row for each image: the image (H, W, 3), and bars of its (label, probability)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.6]})
    for (name, image, classes), (left, right) in zip(rows, axes, strict=True):
        left.imshow(image)
        left.set_title(_short(name, 40), fontsize=8)
        left.axis("off")
        labels = [_short(label, 32) for label, _ in classes]
        right.barh(range(len(classes)), [p for _, p in classes], color="#3b6ea5")
        right.set_yticks(range(len(classes)), labels, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(0, 1)
        right.tick_params(axis="x", labelsize=7)
        for i, (_, p) in enumerate(classes):
            right.text(min(p + 0.01, 0.88), i, f"{p:.3f}", va="center", fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def save(figure: Any, path: Path, dpi: int = 110) -> Path:
    """Writes a PNG: an interrupted run leaves no half of a picture."""
    atomic_write(path, lambda f: figure.savefig(f, dpi=dpi, format="png"))
    return path

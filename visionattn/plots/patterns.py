"""Patterns as pictures: which keys a query sees, which key tiles a query tile visits, what that costs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from visionattn.ops.local.patterns import Pattern

from .maps import grid_of

# not visited, visited under a mask, visited without one, the query tile
COLOURS = ("#f2f2f2", "#f5a623", "#3b7dd8", "#111111")


def tile_visits(
    pattern: Pattern, grid: Sequence[int], query: Sequence[int], key: Sequence[int], at: Sequence[int]
) -> np.ndarray:
    """What the query tile that holds token ``at`` does with every key tile of the grid's raster.

    Returns:
        integers, one per key tile along each axis: 0 not visited, 1 visited under a mask, 2 visited whole.
    """
    grid = tuple(grid)
    first = [a // q * q for a, q in zip(at, query, strict=True)]
    last = [min(f + q, n) for f, q, n in zip(first, query, grid, strict=True)]
    axes = [torch.arange(a, b) for a, b in zip(first, last, strict=True)]
    index = torch.zeros((), dtype=torch.long)
    for axis, n in zip(torch.meshgrid(*axes, indexing="ij"), grid, strict=True):
        index = index * n + axis
    pattern.check(grid)
    keys = torch.arange(math.prod(grid))
    seen = pattern.visible(grid, index.reshape(-1, 1), keys[None, :])
    some, every = seen.any(0).reshape(grid), seen.all(0).reshape(grid)
    counts = [-(-n // k) for n, k in zip(grid, key, strict=True)]
    padding = [side for n, k, c in zip(reversed(grid), reversed(key), reversed(counts), strict=True)
               for side in (0, c * k - n)]  # fmt: skip
    split = [size for c, k in zip(counts, key, strict=True) for size in (c, k)]
    within = list(range(1, 2 * len(grid), 2))
    some = torch.nn.functional.pad(some, padding).reshape(split).amax(within)
    every = torch.nn.functional.pad(every, padding, value=True).reshape(split).amin(within)
    return (some.int() + (some & every).int()).numpy()


def visits_figure(
    panels: Sequence[tuple[str, Pattern, Sequence[int], Sequence[int]]],
    grid: Sequence[int],
    title: str,
    places: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Key tiles that some query tiles visit, a panel for each (label, pattern, query tile, key tile).

    Grids of three axes are shown in the plane of the first place. ``places``: tokens whose tiles are shown; by default
    one at the border and one inside.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    grid = tuple(grid)
    if places is None:
        places = [tuple(n // 8 for n in grid), tuple(n * 5 // 8 for n in grid)]
    figure, axes = grid_of(len(panels), title)
    for axis, (label, pattern, query, key) in zip(axes, panels, strict=True):
        maps = [tile_visits(pattern, grid, query, key, place) for place in places]
        picture = np.maximum.reduce(maps)
        while picture.ndim > 2:
            picture = picture[places[0][0] // key[0]]
        picture = np.atleast_2d(picture)
        height, width = (1, *grid)[-2], grid[-1]
        side = (0, picture.shape[1] * key[-1], picture.shape[0] * (1, *key)[-2], 0)
        axis.imshow(picture, extent=side, cmap=ListedColormap(COLOURS[:3]), vmin=0, vmax=2, interpolation="nearest")
        for place in places:
            y, x = (0, *place)[-2], place[-1]
            qy, qx = (1, *query)[-2], query[-1]
            axis.add_patch(Rectangle((x // qx * qx, y // qy * qy), qx, qy, color=COLOURS[3]))
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        if not 1 / 8 < height / width < 8:  # a line of tokens would be a pixel high
            axis.set_aspect("auto")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(label, fontsize=8)
    legend = [Patch(color=c, label=t) for c, t in zip(COLOURS[1:], ("masked", "whole", "query tile"), strict=True)]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def simulation_figure(simulation: Any) -> Any:
    """Visits of the best tiles, and each tiling's predicted gain of a layer and of a step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    rows = simulation.rows
    place = np.arange(len(rows))
    for shift, label, color, values in (
        (-0.2, "a layer", COLOURS[2], [row.layer_speedup for row in rows]),
        (0.2, "a step", COLOURS[1], [row.speedup for row in rows]),
    ):
        bars = axis.bar(place + shift, values, 0.4, label=label, color=color)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(1.0, color="black", lw=0.8)
    axis.set_yscale("log")  # a layer may gain a hundred times what a step does
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(place, [f"{row.query}\n{row.key}" for row in rows], fontsize=7)
    axis.set_ylabel("predicted gain over dense")
    axis.set_xlabel("tiles of queries, of keys")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"{simulation.pattern} on {' x '.join(map(str, simulation.grid))}\n{simulation.rates.source}",
                   fontsize=8)  # fmt: skip
    return figure

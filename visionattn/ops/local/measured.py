"""Predictions of :mod:`visionattn.ops.local.simulate` beside what benchmarks measured."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .patterns import Disk, Grid, Neighborhood, Pattern
from .simulate import Rates, simulate

# whole layers with 512 text tokens, 24 heads of 128: rows of benchmarks/local_attention.py
LAYERS: dict[str, tuple[Grid, Pattern]] = {
    "disk-1024": ((64, 64), Disk(16)),
    "disk-4096": ((256, 256), Disk(16)),
    "disk-8192": ((512, 512), Disk(16)),
    "w32-1024": ((64, 64), Neighborhood(32, 16)),
    "w80-s16-text": ((256, 256), Neighborhood(80, 16)),
}
# rows of benchmarks/flux.py
STEPS: dict[str, Pattern] = {"disk8": Disk(8), "disk16": Disk(16), "window80s16": Neighborhood(80, 16)}


@dataclass(frozen=True)
class Comparison:
    """A row: what, on which GPU, milliseconds predicted and measured."""

    what: str
    gpu: str
    predicted_ms: float
    measured_ms: float

    @property
    def ratio(self) -> float:
        return self.predicted_ms / self.measured_ms


# which kernels ran a file's rows is not in all of them
MEASURED_RATES = ("h100-eager", "h100-triton")


def compare_with(path: str | Path, rates: Rates | str | None = None) -> list[Comparison]:
    """Reads a CSV file of ``benchmarks/local_attention.py`` or ``benchmarks/flux.py`` and predicts its rows.

    Args:
        rates: a set of :data:`~visionattn.ops.local.simulate.RATES`; without it, of the kernels that run now and of
            Triton's kernels alone those that fit the file's rows better.

    Raises:
        ValueError: for a file of another kind.
        FileNotFoundError: for one that is not there.
    """
    with Path(path).open(newline="", errors="replace") as file:
        # longer rows than the first line have their rest under None
        rows = list(csv.DictReader(file, restkey="more"))
    columns = set(rows[0]) if rows else set()
    if {"row", "what", "implementation", "ms"} <= columns:
        rows = [row for row in rows if row["what"] == "whole layer" and row["row"] in LAYERS]
        predict = _layer
    elif {"size", "row", "mode", "ms", "how"} <= columns:
        rows = [row for row in rows if row["mode"] == "eager" and _is_step(row)]
        predict = _step
    else:
        raise ValueError(
            f"{path} is no result of benchmarks/local_attention.py or benchmarks/flux.py (columns "
            f"{', '.join(sorted(columns)) or 'none'}): give one of theirs"
        )
    found = []
    for name in MEASURED_RATES if rates is None else (rates,):
        found.append([c for c in (predict(row, name) for row in rows) if c is not None])
    return min(found, key=lambda rows: max((abs(math.log(c.ratio)) for c in rows), default=0.0))


def _is_step(row: dict) -> bool:
    # a step that stayed dense says so: its time is the dense one's
    return row["row"] in STEPS and not row["how"].startswith("dense")


def _layer(row: dict, rates: Rates | str) -> Comparison | None:
    if row["implementation"] != "ours" or not row["ms"]:
        return None
    grid, pattern = LAYERS[row["row"]]
    best = simulate(grid, pattern, rates=rates, raster=None, placement="anchored").best
    return Comparison(f"{row['row']}, a layer", row.get("gpu", ""), best.ms, float(row["ms"]))


def _step(row: dict, rates: Rates | str) -> Comparison:
    side = int(re.sub(r"\D", "", row["size"])) // 16
    found = simulate((side, side), STEPS[row["row"]], rates=rates, raster=None, placement="anchored")
    return Comparison(
        f"{row['row']}, a FLUX.1 step at {row['size']} px", row.get("gpu", ""), found.step_ms / found.best.speedup,
        float(row["ms"]),
    )  # fmt: skip

"""Pictures of the tables that other benchmarks wrote: FLUX's steps, video networks, local attention.

    python benchmarks/pictures.py                       # of every CSV in benchmarks/results that it knows
    python benchmarks/pictures.py path/to/flux-x.csv    # of these

A picture lies beside its CSV, or in ``--out``. It draws what the file holds and measures nothing.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from visionattn._files import atomic_write

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "dense": "#9a9a9a", "ours": "#1f6fb4", "window": "#76b0dd",
    "natten": "#d98b2b", "flex": "#7a5195", "stub": "#d5d5d5",
}  # fmt: skip
FLUX_ROWS = {
    "dense": ("dense (cuDNN)", "dense"), "window80s16": ("Neighborhood(80, stride=16)", "window"),
    "disk16": ("Disk(16)", "ours"), "stub": ("without attention", "stub"),
}  # fmt: skip
LOCAL_ROWS = {
    "disk-4096": "disk 16, 256 x 256", "disk-8192": "disk 16, 512 x 512", "w80-s16": "window 80 stride 16, 256 x 256",
    "w48-s1": "window 48, 256 x 256", "w80-s1": "window 80, 256 x 256",
    "video": "(18, 24, 24) stride (2, 8, 8), 30 x 48 x 80", "hunyuan": "the same, 33 x 45 x 80",
    "backward disk": "backward, disk 16, 128 x 128", "backward w80 s16": "backward, window 80 stride 16, 128 x 128",
}  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.4g}"


def bars(axis: Any, groups: Sequence[tuple[str, list[tuple[str, float, str, str]]]], title: str) -> None:
    """Groups of horizontal bars on a logarithmic axis: (name of the group, [(label, ms, colour's key, note)])."""
    place, ticks = 0.0, []
    for name, rows in groups:
        ticks.append((place + (len(rows) - 1) / 2, name))
        for label, ms, kind, note in rows:
            axis.barh(place, ms, color=COLOURS[kind], height=0.85)
            axis.text(ms, place, f" {label}: {number(ms)} ms{note}", va="center", fontsize=7)
            place += 1
        place += 0.8
    axis.set_xscale("log")
    every = [ms for _, rows in groups for _, ms, _, _ in rows]
    axis.set_xlim(10 ** math.floor(math.log10(min(every))) / 2, max(every) * 60)  # with room for the words
    axis.set_xlabel("ms, logarithmic", fontsize=8)
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=10)


def flux(rows: list[dict[str, str]]) -> Figure:
    """Milliseconds of a step by resolution, a panel for each mode; ratios are to the eager dense step."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(8.5, 4.2 * len(modes)), layout="constrained")
    for axis, mode in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes, strict=True):
        groups = []
        for size in sorted({int(row["size"]) for row in rows}):
            found = {r["row"]: r for r in rows if (r["mode"], int(r["size"])) == (mode, size) and r["row"] in FLUX_ROWS}
            if found:
                groups.append((f"{size} px", [_flux_bar(name, found[name]) for name in FLUX_ROWS if name in found]))
        bars(axis, groups, f"FLUX.1's denoising step, {mode}: {rows[0]['gpu']}, torch {rows[0]['torch']}")
    return figure


def _flux_bar(name: str, row: dict[str, str]) -> tuple[str, float, str, str]:
    label, kind = FLUX_ROWS[name]
    ratio = row.get("over_eager_dense") or row["over_dense"]
    note = f", {float(ratio):.2f} x eager dense" if ratio and (name, row["mode"]) != ("dense", "eager") else ""
    return label, float(row["ms"]), kind, note


def video(rows: list[dict[str, str]]) -> Figure:
    """Milliseconds of a step of each video network."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    groups = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: -float(row["scaled_ms"]))
        groups.append((model, [_video_bar(row) for row in own]))
    bars(figure.subplots(), groups, f"a step at 720p: {rows[0]['gpu']}, torch {rows[0]['torch']}")
    return figure


def _video_bar(row: dict[str, str]) -> tuple[str, float, str, str]:
    name = row["row"]
    kind = name if name in COLOURS else "flex" if name.startswith("flex") else "ours"
    note = f", {float(row['over_dense']):.2f} x" if row["over_dense"] and name != "dense" else ""
    return {"stub": "without attention"}.get(name, name), float(row["scaled_ms"]), kind, note


def local(rows: list[dict[str, str]]) -> Figure:
    """Milliseconds of a layer, ours beside natten's, FlexAttention's and dense attention."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    groups = []
    for key, title in LOCAL_ROWS.items():
        own = [
            row for row in rows if row["row"] == key and row["implementation"] in ("ours", "natten", "flex", "cudnn")
        ]
        order = ("cudnn", "flex", "natten", "ours")
        own.sort(key=lambda row: order.index(row["implementation"]))
        found = [(_local_label(r), float(r["ms"]), {"cudnn": "dense"}.get(r["implementation"], r["implementation"]), "")
                 for r in own]  # fmt: skip
        if found:
            groups.append((title, found))
    bars(
        figure.subplots(), groups, f"one layer: {rows[0]['gpu']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}"
    )
    return figure


def _local_label(row: dict[str, str]) -> str:
    name = {"cudnn": "dense cuDNN", "flex": "FlexAttention"}.get(row["implementation"], row["implementation"])
    what = row["what"].replace("dense, no pattern", "").replace("backward, dense", "").replace("backward, ", "")
    return f"{name}, {what}" if what else name


KINDS: dict[str, Callable[[list[dict[str, str]]], Figure]] = {"flux-": flux, "video-": video, "local-table-": local}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="CSV files, of names that begin as the benchmarks' own")
    parser.add_argument("--out", type=Path, help="folder for the pictures; beside the files where not given")
    args = parser.parse_args()
    files = args.files or sorted(path for kind in KINDS for path in RESULTS.glob(f"{kind}*.csv"))
    for path in files:
        draw = next((draw for kind, draw in KINDS.items() if path.name.startswith(kind)), None)
        if draw is None:
            sys.exit(f"{path.name}: no picture of that: give a file whose name begins with {', '.join(KINDS)}")
        if not path.is_file():
            sys.exit(f"{path}: there is no such file")
        picture = (args.out or path.parent) / path.with_suffix(".png").name
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(read(path))
        atomic_write(picture, lambda file, figure=figure: figure.savefig(file, dpi=110, format="png"))
        print(picture)


if __name__ == "__main__":
    main()

"""The goals of local attention against a table that benchmarks/local_attention.py measured.

python benchmarks/local_goals.py benchmarks/results/local_attention-*.csv
"""

import csv
import sys
from pathlib import Path
from typing import Any

NAT = ("56 x 56 x 2 heads", "28 x 28 x 4 heads", "14 x 14 x 8 heads")
W28 = "image queries, window (28, 28) stride (1, 1)"
SMALL = [
    f"{pattern}, {text} text"
    for pattern in ("disk 8", "disk 16", "disk 32", "window 16 stride 16", "window 32 stride 16", "window 48 stride 16",
                    "window 16", "window 32", "cross 8")
    for text in (512, 77, 0)
]  # fmt: skip


class Known:
    """Lines by (row, what, implementation)."""

    def __init__(self, lines: dict[tuple[str, str, str], dict]):
        self.lines = lines

    def get(self, row: str, what: str, implementation: str, column: str = "ms") -> float | None:
        value = self.lines.get((row, what, implementation), {}).get(column)
        return float(value) if value else None

    def ms(self, *key: str) -> float | None:
        return self.get(*key)

    def rate(self, *key: str, kind: str = "executed") -> float | None:
        return self.get(*key, f"{kind}_tflops")


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _image(known: Known, row: str, kind: str, goal: float, label: str) -> tuple:
    ours = known.rate(row, "image queries", "ours", kind=kind)
    return label, over(ours, known.rate(row, "dense, no pattern", "cudnn")), goal, "at least"


def _natten(known: Known, row: str, what: str, goal: float, label: str) -> tuple:
    return label, over(known.ms(row, what, "natten"), known.ms(row, "image queries", "ours")), goal, "at least"


def _flex(known: Known, what: str, goal: float) -> tuple:
    found = over(known.ms("disk-4096", f"whole layer, {what}", "flex"), known.ms("disk-4096", "whole layer", "ours"))
    return f"the same, whole layer: FlexAttention's time over ours, {what}", found, goal, "at least"


def _text(known: Known) -> list[tuple]:
    rows = []
    for px in (1024, 2048, 4096, 8192):
        where = {4096: ("disk-4096", "dense, no pattern"), 8192: ("disk-8192", "dense, no pattern")}
        dense = known.rate(*where.get(px, ("text", f"dense, {px} px")), "cudnn")
        ours = known.rate("text", f"text rows, {px} px", "ours")
        rows.append((f"text queries, {px} px: TFLOP/s over dense cuDNN's", over(ours, dense), 0.9, "at least"))
        same = known.rate("text", f"text rows, {px} px", "cudnn")
        rows.append((f"text queries, {px} px: over cuDNN's on the same rows", over(ours, same), None, ""))
    return rows


def _small(known: Known) -> list[tuple]:
    """What a caller gets who asks the planner, against dense attention."""
    rows = []
    for what in SMALL:
        line = known.lines.get(("small", what, "ours"))
        gain = over(known.ms("small", f"dense, {what.rpartition(', ')[2]}", "cudnn"), known.ms("small", what, "ours"))
        if line is None or gain is None:
            continue
        sparse = line["note"].endswith("sparse")
        label = f"64 x 64, {what}: dense's time over the layer's {gain:.2f}, the planner says {line['note'][9:]}"
        rows.append((label, gain if sparse else 1.0, 1.0, "at least"))
    return rows


def _backward(known: Known, name: str, label: str) -> tuple:
    found = over(known.rate(name, "backward, whole layer", "ours"), known.rate(name, "backward, dense", "cudnn"))
    return label, found, 0.7, "at least"


def _nat(known: Known) -> list[tuple]:
    rows = []
    for layer in NAT:
        for mode in ("forward", "forward and backward"):
            what = f"{layer}, {mode}"
            ours, biased = known.ms("nat", what, "ours"), known.ms("nat", what, "ours, biased")
            rows.append((f"NAT-Tiny, {what}: natten's time over ours", over(known.ms("nat", what, "natten"), ours),
                         5.0, "at least"))  # fmt: skip
            rows.append((f"NAT-Tiny, {what}, biased: FlexAttention's time over ours",
                         over(known.ms("nat", what, "flex, biased"), biased), 3.0, "at least"))  # fmt: skip
    return rows


def goals(known: Known) -> list[tuple]:
    """(what, measured or None, goal or None, how to compare)."""
    w80, w48 = "image queries, window (80, 80) stride (1, 1)", "image queries, window (48, 48) stride (1, 1)"
    return [
        _image(known, "disk-4096", "useful", 0.65, "disk 16 on 256 x 256, image queries: useful TFLOP/s over dense's"),
        _flex(known, "raster", 7.0),
        _flex(known, "tile order", 3.0),
        _natten(known, "disk-4096", W28, 2.2, "the same, image queries: time of natten's window 28 over ours"),
        ("disk 16 on 512 x 512, image queries, ms", known.ms("disk-8192", "image queries", "ours"), 11.2, "at most"),
        ("the same, whole layer, ms", known.ms("disk-8192", "whole layer", "ours"), 14.1, "at most"),
        _image(known, "w80-s16", "executed", 0.95, "window 80 stride 16 on 256 x 256: executed TFLOP/s over dense's"),
        _image(known, "w80-s16-text", "executed", 0.92, "the same with text"),
        _natten(known, "w48-s1", w48, 1.3, "window 48 stride 1: natten's time over ours"),
        _natten(known, "w80-s1", w80, 1.3, "window 80 stride 1: natten's time over ours"),
        _image(known, "video", "useful", 0.95, "(18, 24, 24) stride (2, 8, 8) on 30 x 48 x 80: useful over dense's"),
        _image(known, "hunyuan", "useful", 0.8, "the same on 33 x 45 x 80"),
        *_text(known),
        *_small(known),
        _backward(known, "backward disk", "backward of disk 16 on 128 x 128: executed TFLOP/s over dense's"),
        _backward(known, "backward w80 s16", "backward of window 80 stride 16 on 128 x 128: executed over dense's"),
        *_nat(known),
    ]


def table(report: Any) -> str:
    """Markdown. `report`: anything with `known`, lines by (row, what, implementation)."""
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for label, found, goal, compare in goals(Known(report.known)):
        if found is None:
            lines.append(f"| {label} | - | {'' if goal is None else f'{compare} {goal:g}'} |")
            continue
        short = goal is not None and (found < goal if compare == "at least" else found > goal)
        text = "" if goal is None else f"{compare} {goal:g}{': not reached' if short else ''}"
        lines.append(f"| {label} | {found:.2f} | {text} |")
    return "\n".join(lines)


class _File:
    def __init__(self, path: str):
        with Path(path).open(newline="") as file:
            self.known = {(line["row"], line["what"], line["implementation"]): line for line in csv.DictReader(file)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}\n\n{table(_File(name))}\n")

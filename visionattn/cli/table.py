"""Results that print as a table and as JSON, and argument types that commands share."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


@dataclass
class Table:
    """Rows of cells under a header; ``title`` and ``notes`` stand around it; ``status`` is the exit status."""

    header: Sequence[str]
    rows: list[Sequence[Any]]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    status: int = 0

    def as_dict(self) -> list[dict[str, Any]]:
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]

    def __str__(self) -> str:
        cells = [[_text(c) for c in row] for row in self.rows]
        widths = [max([len(h), *(len(row[i]) for row in cells)]) for i, h in enumerate(self.header)]
        right = [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(self.header))]
        lines = [self.title] if self.title else []
        lines.append(_line(self.header, widths, right))
        lines += [_line(row, widths, right) for row in cells]
        return "\n".join([*lines, *self.notes])


@dataclass
class Facts:
    """Named values, one a line."""

    values: dict[str, Any]
    status: int = 0

    def as_dict(self) -> dict[str, Any]:
        return self.values

    def __str__(self) -> str:
        width = max(len(k) for k in self.values)
        return "\n".join(f"{k:<{width}}  {line}" for k, v in self.values.items() for line in _lines(v))


def _lines(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        return [f"{k}: {_text(v)}" for k, v in value.items()] or ["none"]
    if isinstance(value, list | tuple):
        return [", ".join(_text(v) for v in value) or "none"]
    return [_text(value)]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str], widths: list[int], right: list[bool]) -> str:
    parts = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(cells, widths, right, strict=True)]
    return "  ".join(parts).rstrip()

"""What a patch did, layer by layer."""

from dataclasses import dataclass, field
from typing import Any

from visionattn.ops.local.planner import kernels_that_ran


@dataclass
class Report:
    """Rows (dicts), printed as a table; equal neighbours are folded into one line."""

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"layers": self.rows, "notes": self.notes}

    def __str__(self) -> str:
        lines, i = [], 0
        while i < len(self.rows):
            j = i
            while j + 1 < len(self.rows) and _fold(self.rows[j + 1]) == _fold(self.rows[i]):
                j += 1
            row = self.rows[i]
            name = row["layer"] if i == j else f"{row['layer']} ... {self.rows[j]['layer']} ({j - i + 1} layers)"
            text = f"{name}: {row['pattern']}, {row['sparse']} sparse and {row['dense']} dense calls"
            if row["saved"] is not None:
                text += f", {100 * row['saved']:.1f} % of the pairs skipped on {_grid(row['grid'])}"
            if row["seconds"]:
                text += f", {1000 * sum(r['seconds'] for r in self.rows[i : j + 1]):.1f} ms"
            if row["reason"]:
                text += f"; last call dense: {row['reason']}"
            lines.append(text)
            i = j + 1
        return "\n".join([*lines, *self.notes])


def _fold(row: dict[str, Any]) -> tuple:
    return tuple(v for k, v in row.items() if k not in ("layer", "seconds"))


def _grid(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid)) + " tokens"


def report(sessions: list, note: str | None = None) -> Report:
    """The report of patched transformers."""
    rows, notes = [], [f"preset: {note}"] if note else []
    saved: dict[tuple, float] = {}
    for session in sessions:
        layout = session.layout
        ran: list[str] = []
        for layer in session.layers.values():
            share = None
            if layout is not None:
                key = (layer.pattern, layout)
                if key not in saved:
                    saved[key] = _saved(layer.pattern, layout)
                share = saved[key] if layer.timing.calls["sparse"] else 0.0
            rows.append(
                {
                    "layer": layer.site.name,
                    "pattern": str(layer.pattern),
                    "backend": layer.backend,
                    "grid": layout.grid if layout else None,
                    "sparse": layer.timing.calls["sparse"],
                    "dense": layer.timing.calls["dense"],
                    "saved": share,
                    "seconds": sum(layer.timing.seconds.values()),
                    "reason": layer.reason,
                }
            )
            if layout is not None and layer.timing.calls["sparse"]:
                ran += [f"{layer.pattern}: {way}" for way in kernels_that_ran(layout.grid, layer.pattern)]
        notes += dict.fromkeys(ran)
        if session.steps.first or session.steps.until is not None:
            notes.append(f"dense steps of the last generation: {session.steps.done}")
        if session.spread:
            notes.append(f"tokens spread over processes: {session.spread}")
        if session.compiled:
            notes.append("calls of compiled blocks are not counted")
        if session.problem:
            notes.append(f"the last call stayed dense: {session.problem}")
    return Report(rows, notes)


def _saved(pattern: Any, layout: Any) -> float:
    """Share of a joint call's (query, key) pairs that the pattern leaves out."""
    n, always = layout.tokens, layout.text + layout.extra
    total = (n + always) ** 2
    return 1.0 - (pattern.pairs(layout.grid) + 2 * n * always + always**2) / total

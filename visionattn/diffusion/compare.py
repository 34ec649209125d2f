"""One pipeline, dense and patched, with the same prompts and seeds: how far the pictures moved, and what it saved.

Kept in a folder: ``results.csv``, ``index.html``, every picture as PNG, the patches' reports, and the settings that
they were made with. A run that ends early goes on where it stopped.
"""

import contextlib
import csv
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image

from visionattn._files import atomic_write, lock, replacing, sweep
from visionattn.ops.local.patterns import Pattern

from .agent_sd_patch import agent_sd
from .compare_page import page, shown, side_by_side, side_by_side_name
from .metrics import METRICS, Metrics
from .patch import sparsify

DENSE = "dense"
COLUMNS = ("prompt", "seed", "method", "seconds", *METRICS, "frames", "picture")

Method = Pattern | str | Callable[[Any], Any]


@dataclass
class Comparison:
    """Rows of ``results.csv`` (dicts of :data:`COLUMNS`; numbers, or None where not measured) and what they mean.

    It holds all that the folder has, from earlier calls too.

    Attributes:
        missing: pictures that this call did not come to make.
        notes: metrics that are left out, and why.
    """

    folder: Path
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    missing: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / "index.html"

    @property
    def methods(self) -> list[str]:
        """Without the dense one, in the order that they were made."""
        return [m for m in dict.fromkeys(row["method"] for row in self.rows) if m != DENSE]

    def pairs(self) -> list[tuple[str, int]]:
        """Prompts and seeds."""
        return list(dict.fromkeys((row["prompt"], row["seed"]) for row in self.rows))

    def of(self, prompt: str, seed: int) -> list[dict[str, Any]]:
        """The rows of one prompt and seed, the dense one first."""
        rows = [row for row in self.rows if (row["prompt"], row["seed"]) == (prompt, seed)]
        return sorted(rows, key=lambda row: row["method"] != DENSE)

    def report_path(self, method: str) -> Path:
        return self.folder / "reports" / f"{_slug(method)}.txt"

    def summary(self) -> list[dict[str, Any]]:
        """One dict a method: number of pictures, medians of seconds and of the ratio to dense, means of the metrics."""
        dense = {(r["prompt"], r["seed"]): r["seconds"] for r in self.rows if r["method"] == DENSE}
        found = []
        for method in (DENSE, *self.methods):
            rows = [r for r in self.rows if r["method"] == method]
            if not rows:
                continue
            ratios = [dense[r["prompt"], r["seed"]] / r["seconds"] for r in rows if (r["prompt"], r["seed"]) in dense]
            entry = {"method": method, "pictures": len(rows), "seconds": statistics.median(r["seconds"] for r in rows)}
            entry["speedup"] = statistics.median(ratios) if ratios and method != DENSE else None
            for name in METRICS:
                values = [r[name] for r in rows if r[name] is not None]
                entry[name] = statistics.fmean(values) if values else None
            found.append(entry)
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "page": str(self.page), "rows": _finite(self.rows), "missing": self.missing,
            "summary": _finite(self.summary()), "settings": self.settings, "notes": self.notes,
        }  # fmt: skip


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no infinity, the PSNR of equal pictures."""
    return [{k: "inf" if v == math.inf else v for k, v in row.items()} for row in rows]


def compare(
    pipe: Any,
    methods: Mapping[str, Method],
    prompts: Sequence[str],
    folder: str | os.PathLike,
    *,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    warmup: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Generates every prompt with every seed, dense and under each method, and compares each picture to the dense one.

    Pictures are compared as 8-bit RGB, videos frame by frame (means). Rows that the folder has are not made again;
    ``settings`` must be the same then. The page is also written when the run is interrupted.

    Args:
        pipe: a pipeline that takes ``prompt`` and ``generator``, unpatched.
        methods: by name, what is patched: a pattern or a preset's name (for :func:`sparsify`), ``'agent_sd'`` (for
            :func:`agent_sd`), or a function of the pipeline that patches it and returns a handle.
        prompts, seeds: the generator of seed s is a CPU's, so that a picture does not depend on the device.
        folder: where all goes; made if it is not there.
        options: for :func:`sparsify`, with every pattern (``dense_steps=9``). Name them in the methods' names.
        arguments: for the pipeline's call (``height``, ``width``, ``num_inference_steps``, ``guidance_scale`` ...).
        settings: what else tells this comparison from another (the model's name, the device), for page and check.
        warmup: one picture of each method, not kept, before any that is timed: of two steps, or of as many as it takes
            for one that is not dense. What can't run fails there.
        progress: gets a line for every picture.

    Raises:
        ValueError: for no or doubled prompts, seeds or methods, a pipeline that is not prompted or does not take the
            arguments, a patch that fails, or a folder that holds another comparison or is in use.
    """
    arguments = dict(arguments or {})
    _check(pipe, methods, prompts, seeds, arguments)
    patches = {name: _patch(method, dict(options or {})) for name, method in methods.items()}
    for name, patch in patches.items():  # before hours of dense pictures; also refuses a pipeline that is patched
        try:
            patch(pipe).remove()
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    facts = {**dict(settings or {}), **{k: _plain(v) for k, v in arguments.items()}}
    folder = Path(folder)
    with _locked(folder):
        _same_settings(folder, facts)
        run = _Run(pipe, folder, arguments, warmup, progress or (lambda line: None))
        wanted = [(prompt, int(seed)) for prompt in prompts for seed in seeds]
        try:
            run.all(wanted, patches)
        finally:
            have = {_key(row) for row in run.rows}
            missing = sum((*w, m) not in have for w in wanted for m in (DENSE, *patches))
            result = Comparison(folder, run.rows, facts, missing, run.metrics.notes)
            if run.rows:
                _draw(result)
    return result


def _check(
    pipe: Any, methods: Mapping, prompts: Sequence[str], seeds: Sequence[int], arguments: Mapping[str, Any]
) -> None:
    for what, values in (("methods", list(methods)), ("prompts", prompts), ("seeds", seeds)):
        if isinstance(values, str) or not values:
            raise ValueError(f"{what}={values!r}: give a list of at least one")
        if len(set(values)) != len(values):
            raise ValueError(f"{what} has {next(v for v in values if list(values).count(v) > 1)!r} twice")
    if DENSE in methods:
        raise ValueError("a method is called 'dense': that is the name of the unpatched pipeline")
    if len({_slug(m) for m in methods}) != len(methods):
        raise ValueError("two methods have names that differ in punctuation only: their files would be the same")
    accepted = inspect.signature(type(pipe).__call__).parameters
    lacking = [name for name in ("prompt", "generator") if name not in accepted]
    if lacking:
        raise ValueError(f"{type(pipe).__name__} takes no {lacking[0]}: compare is for pipelines that are prompted")
    strange = [name for name in arguments if name not in accepted]
    if strange and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise ValueError(f"{type(pipe).__name__} takes no {strange[0]}: it takes {', '.join(list(accepted)[1:])}")


def _patch(method: Method, options: dict[str, Any]) -> Callable[[Any], Any]:
    if method == "agent_sd":
        return agent_sd
    if isinstance(method, Pattern | str):
        return lambda pipe: sparsify(pipe, method, **options)
    return method


class _Run:
    """The pictures that are still to be made."""

    def __init__(self, pipe: Any, folder: Path, arguments: dict, warmup: bool, progress: Callable[[str], None]):
        self.pipe, self.folder, self.arguments, self.progress = pipe, folder, arguments, progress
        self.warmup = warmup
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        self.rows = _read(folder)
        self.metrics = Metrics(getattr(pipe, "_execution_device", "cpu"))

    def all(self, wanted: list[tuple[str, int]], patches: dict[str, Callable]) -> None:
        self.fill()
        have = {_key(row) for row in self.rows}
        known = {_slug(row["method"]): row["method"] for row in self.rows}
        clash = next((m for m in patches if known.get(_slug(m), m) != m), None)
        if clash is not None:
            raise ValueError(
                f"method {clash!r}: the folder has {known[_slug(clash)]!r}, whose files have the same names"
            )
        todo = {m: [w for w in wanted if (*w, m) not in have] for m in (DENSE, *patches)}
        total, done = sum(map(len, todo.values())), 0
        skipped = len(wanted) * len(todo) - total
        if skipped:
            self.progress(f"{skipped} pictures are there already")
        if self.warmup:  # all of them first: what fails does so before hours of dense pictures
            self.warm({method: pairs[0] for method, pairs in todo.items() if pairs}, patches)
        for method, pairs in todo.items():
            if not pairs:
                continue
            with contextlib.ExitStack() as stack:
                handle = None
                if method != DENSE:
                    handle = patches[method](self.pipe)
                    stack.callback(handle.remove)
                for prompt, seed in pairs:
                    row = self.one(prompt, seed, method)
                    done += 1
                    self.progress(f"{done} of {total}: {_line(row)}")
                if handle is not None and hasattr(handle, "report"):
                    atomic_write(self.folder / "reports" / f"{_slug(method)}.txt", f"{handle.report()}\n")

    def warm(self, first: dict[str, tuple[str, int]], patches: dict[str, Callable]) -> None:
        for method, (prompt, seed) in first.items():
            self.progress(f"warming up: {method}")
            with contextlib.ExitStack() as stack:
                steps = 2
                if method != DENSE:
                    handle = patches[method](self.pipe)
                    stack.callback(handle.remove)
                    steps = max(steps, *(_leading(s) + 1 for s in getattr(handle, "sessions", ())), 0)
                try:
                    self.generate(prompt, seed, steps)
                except ValueError as e:
                    raise ValueError(f"{method}: {e}") from None

    def one(self, prompt: str, seed: int, method: str) -> dict[str, Any]:
        frames, seconds = self.generate(prompt, seed)
        name = f"pictures/{picture_stem(prompt, seed)}/{_slug(method)}"
        picture = f"{name}.png" if len(frames) == 1 else f"{name}-%04d.png"
        paths = frame_paths(self.folder, picture, len(frames))
        for path, frame in zip(paths, frames, strict=True):
            _save(path, frame)
        row = dict.fromkeys(COLUMNS)
        row |= dict(prompt=prompt, seed=seed, method=method, seconds=seconds, frames=len(frames), picture=picture)
        if method != DENSE:
            row |= self.metrics(load_frames(self.folder, self.dense(row)), frames)
        self.rows.append(row)
        _store(self.folder, self.rows)
        return row

    def dense(self, row: dict[str, Any]) -> dict[str, Any]:
        return next(r for r in self.rows if _key(r) == (row["prompt"], row["seed"], DENSE))

    def fill(self) -> None:
        """Metrics that an earlier run had to leave out."""
        for row in self.rows:
            lacking = [name for name in METRICS if row[name] is None and name in self.metrics.available]
            if lacking and row["method"] != DENSE:
                frames = (load_frames(self.folder, r) for r in (self.dense(row), row))
                row |= self.metrics(*frames, lacking)
                _store(self.folder, self.rows)

    def generate(self, prompt: str, seed: int, at_most: int | None = None) -> tuple[list[np.ndarray], float]:
        """Frames (H, W, 3), uint8, and the seconds of the call, decoding and text encoding included."""
        arguments = dict(self.arguments)
        if at_most is not None and "num_inference_steps" in self.accepted:
            steps = arguments.get("num_inference_steps") or self.accepted["num_inference_steps"].default
            if isinstance(steps, int):
                arguments["num_inference_steps"] = min(steps, at_most)
        _synchronise()
        start = time.perf_counter()
        out = self.pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments)
        _synchronise()
        return frames_of(out), time.perf_counter() - start


def _leading(session: Any) -> int:
    """Dense steps that a warm-up has to pass; as many as there are where a timestep ends them."""
    steps = getattr(session, "steps", None)  # AgentSD has none
    return 0 if steps is None else steps.first if steps.until is None else 10_000


def frames_of(out: Any) -> list[np.ndarray]:
    """The picture, or the frames of the video, that a pipeline returned: (H, W, 3) arrays of uint8.

    Raises:
        ValueError: for an output that has neither, or that is not a picture a value.
    """
    images = getattr(out, "images", None)
    if images is None:
        videos = getattr(out, "frames", None)
        if videos is None:
            raise ValueError(f"the pipeline returned a {type(out).__name__} without images or frames")
        images = videos[0]
    else:
        images = images[:1]
    if torch.is_tensor(images):
        images = images.float().cpu().movedim(-3, -1).numpy()
    frames = []
    for image in images:
        if isinstance(image, Image.Image):
            frames.append(np.asarray(image.convert("RGB")))
            continue
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"the pipeline returned arrays of shape {array.shape}: pictures are (height, width, 3)")
        frames.append(array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8))
    return frames


def frame_paths(folder: Path, picture: str, frames: int) -> list[Path]:
    return [folder / (picture % i if "%04d" in picture else picture) for i in range(frames)]


def load_frames(folder: Path, row: Mapping[str, Any]) -> list[np.ndarray]:
    """The pictures of a row, as they were saved."""
    found = []
    for path in frame_paths(folder, row["picture"], row["frames"]):
        found.append(np.asarray(_open(path)))
    return found


def picture_stem(prompt: str, seed: int) -> str:
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{_slug(prompt)[:32].rstrip('-')}-{digest}-seed{seed}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "x"


def _key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["prompt"], row["seed"], row["method"]


def _line(row: dict[str, Any]) -> str:
    text = f"{row['method']}, seed {row['seed']}, {row['prompt'][:40]!r}: {row['seconds']:.2f} s"
    values = [f"{k.upper()} {row[k]:.4g}" for k in METRICS if row[k] is not None]
    return ", ".join([text, *values])


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# Files


def _locked(folder: Path) -> TextIO:
    """The folder, made and held for this process, without what a killed one left half-written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder, ValueError, "give another folder")
    sweep(folder, "results.csv", "index.html", "settings.json", "pictures/*/*", "reports/*")
    return handle


def _same_settings(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "settings.json"
    facts = json.loads(json.dumps(facts))
    if path.exists() and (folder / "results.csv").exists():  # else nothing was made with them
        there = json.loads(path.read_text())
        for name in {**there, **facts}:
            if there.get(name) != facts.get(name):
                raise ValueError(
                    f"{folder} holds another comparison ({name} {there.get(name)!r} there, {facts.get(name)!r} here): "
                    "give another folder"
                )
    else:
        atomic_write(path, json.dumps(facts, indent=1) + "\n")


def _read(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``results.csv`` whose pictures are there too."""
    path = folder / "results.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {"seed": int, "frames": int, **dict.fromkeys(("seconds", *METRICS), float)}
    found = []
    for number, row in enumerate(rows, 2):
        try:
            for name, kind in kinds.items():
                row[name] = kind(row[name]) if row[name] else None
            whole = all(p.is_file() for p in frame_paths(folder, row["picture"], row["frames"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}, is not a row of a comparison: give another folder") from None
        if whole:
            found.append({name: row[name] for name in COLUMNS})
    dense = {_key(row)[:2] for row in found if row["method"] == DENSE}
    return [row for row in found if _key(row)[:2] in dense]  # the others' comparison is to a picture that is gone


def _store(folder: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(folder / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _draw(result: Comparison) -> None:
    """The pictures side by side, and the page."""
    for prompt, seed in result.pairs():
        rows = result.of(prompt, seed)
        panels = [(row["method"], _open(result.folder / shown(row))) for row in rows]
        with replacing(result.folder / side_by_side_name(result, prompt, seed)) as temporary:
            side_by_side(panels).save(temporary, format="png")
    atomic_write(result.page, page(result))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _save(path: Path, frame: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(frame).save(temporary, format="png")

"""``bench``: throughput, latency and memory of any timm models, into a CSV file and a picture.

Weights are random. Memory is the peak over what was in use before the model: allocated on a GPU, resident on a CPU.
"""

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionattn._files import replacing

from .table import Table, positive

KEY = ("model", "task", "size", "batch", "dtype", "compile", "device")
FIELDS = (*KEY, "images_per_s", "ms", "ms_p90", "memory_MiB", "GMACs", "Mparams", "torch", "note")
SHOWN = ("model", "task", "size", "batch", "dtype", "compile", "images_per_s", "ms", "memory_MiB", "note")
DTYPES = ("float32", "bfloat16", "float16")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("bench", parents=[common], help="throughput, latency and memory of models, as CSV, picture")
    p.add_argument("models", nargs="+", help="names that timm knows; 'agent_*' means those of the zoo")
    p.add_argument("--sizes", nargs="+", type=positive, help="pixels of a side; each model's own by default")
    p.add_argument("--batches", nargs="+", type=positive, default=[1, 32], help="images a call (1 gives the latency)")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="weights and images have it")
    p.add_argument("--modes", nargs="+", choices=("eager", "compile"), default=["eager"])
    p.add_argument("--tasks", nargs="+", choices=("infer", "train"), default=["infer"])
    p.add_argument("--device", help="cuda where there is one, else cpu")
    p.add_argument("--seconds", type=float, default=2.0, help="time that a row is measured for, after warming up")
    p.add_argument("--out", type=Path, help="CSV file (x.csv), gone on with if it is there; the picture lies beside it")
    p.set_defaults(run=bench)


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    model: str
    task: str
    size: int
    batch: int
    dtype: str
    compile: bool
    device: str

    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, field)) for field in KEY)


def bench(args: argparse.Namespace) -> Table:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"device {device!r} can't be used here ({str(e).splitlines()[0]}): --device cpu works"
        ) from None
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: give more than 0")
    if args.out is not None and args.out.suffix != ".csv":
        raise ValueError(f"--out {args.out}: give a name that ends in .csv")
    cases = list(_cases(args, _names(args.models), _device_name(device)))
    rows = read(args.out) if args.out else []
    done = {tuple(row[field] for field in KEY) for row in rows}
    status, interrupted = 0, False
    for number, case in enumerate(cases, 1):
        if case.key() in done:
            continue
        print(f"{number}/{len(cases)} {case.model} {case.task} {case.size} px x {case.batch} {case.dtype} "
              f"{'compiled' if case.compile else 'eager'}", file=sys.stderr, flush=True)  # fmt: skip
        try:
            row = measure(case, device, args.seconds)
        except KeyboardInterrupt:
            interrupted = True
            break
        rows.append({field: "" if row.get(field) is None else str(row[field]) for field in FIELDS})
        if args.out:
            write(args.out, rows)
    wanted = {case.key() for case in cases}
    shown = [row for row in rows if tuple(row[field] for field in KEY) in wanted]
    table = Table(SHOWN, [[_number(row[f]) for f in SHOWN] for row in shown], title=_device_name(device))
    if args.out and shown:
        from visionattn.plots.bench import throughput_picture

        throughput_picture(args.out.with_suffix(".png"), rows)
        table.notes.append(f"rows in {args.out}, picture in {args.out.with_suffix('.png')}")
    if interrupted:
        status = 130
        again = "the same command goes on from here" if args.out else "with --out they would be kept in a file"
        table.notes.append(f"interrupted after {len(shown)} of {len(cases)} rows: {again}")
    elif shown and all(row["note"] for row in shown):
        status = 1
    table.status = status
    return table


def _names(given: list[str]) -> list[str]:
    import fnmatch

    from .models import check_name, zoo

    names: list[str] = []
    for name in given:
        if "*" in name or "?" in name:
            found = fnmatch.filter(zoo(), name)
            if not found:
                raise ValueError(f"no model of the zoo matches {name!r}: 'visionattn list' shows them")
            names += found
        else:
            names.append(check_name(name))
    return list(dict.fromkeys(names))


def _cases(args: argparse.Namespace, names: list[str], device: str) -> Iterator[Case]:
    import timm

    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        sizes = args.sizes or [cfg.input_size[-1] if cfg else 224]
        for task, mode, dtype, size, batch in itertools.product(
            args.tasks, args.modes, args.dtypes, sizes, args.batches
        ):
            yield Case(name, task, size, batch, dtype, mode == "compile", device)


def _device_name(device: str) -> str:
    import platform

    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return cpu if device == "cpu" else device


def build(name: str, size: int) -> Any:
    """The model for a size: models that are built for one get ``img_size``, others take any."""
    import timm

    try:
        return timm.create_model(name, img_size=size)
    except TypeError:
        return timm.create_model(name)


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """One row: medians over calls; ``note`` says why there are none."""
    import gc

    import torch

    row: dict[str, Any] = {field: getattr(case, field) for field in KEY} | {"torch": torch.__version__}
    try:
        row |= _time(case, device, seconds)
    except torch.cuda.OutOfMemoryError:
        row["note"] = "out of memory"
    except Exception as e:  # one model that fails must not cost the others their rows
        row["note"] = f"{type(e).__name__}: {' '.join(str(e).split())}"[:160]
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if case.compile:
        torch.compiler.reset()
    return row


def _time(case: Case, device: str, seconds: float) -> dict[str, Any]:
    import torch

    from .models import measure as cost

    dtype = getattr(torch, case.dtype)
    on_gpu = device.startswith("cuda")
    before = _reset_peak(device)
    model = build(case.model, case.size)
    channels = getattr(model, "in_chans", 3)
    macs = cost(model.eval(), (channels, case.size, case.size))["macs"]
    model = model.to(device, dtype).train(case.task == "train")
    x = torch.randn(case.batch, channels, case.size, case.size, device=device, dtype=dtype)
    step = _training_step(model, x, case) if case.task == "train" else _inference_step(model, x, case)
    step()  # builds kernels and tables
    times: list[float] = []
    begin = time.perf_counter()
    step()
    estimate = time.perf_counter() - begin
    if estimate < seconds:
        for _ in range(min(9, int(seconds / estimate / 4))):
            step()
    if on_gpu:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < seconds and len(times) < 10_000):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _resident("VmHWM")
    memory = None if peak is None or before is None else max(0, peak - before) / 2**20
    return {
        "images_per_s": round(case.batch / median, 2),
        "ms": round(1e3 * median, 3),
        "ms_p90": round(1e3 * sorted(times)[int(0.9 * (len(times) - 1))], 3),
        "memory_MiB": None if memory is None else round(memory, 1),
        "GMACs": round(macs / 1e9, 4),
        "Mparams": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
    }


def _reset_peak(device: str) -> int | None:
    """Bytes in use before a model is built; the peak is counted anew. None where that can't be known."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak of resident memory to what it is now
    except OSError:
        return None
    return _resident("VmRSS") if device == "cpu" else None


def _resident(field: str) -> int | None:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def _inference_step(model: Any, x: Any, case: Case) -> Any:
    import torch

    forward = torch.compile(model) if case.compile else model

    def step() -> None:
        with torch.no_grad():
            forward(x)

    return step


def _training_step(model: Any, x: Any, case: Case) -> Any:
    """Forward, backward and an update by plain SGD, which adds no state of its own to the memory."""
    import torch

    forward = torch.compile(model) if case.compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        loss = forward(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def read(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier run. Raises ValueError for a file with other columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise ValueError(f"{path} is no file of 'visionattn bench' (other columns): give another name")
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """All rows: Ctrl-C leaves a whole file."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"": None, "True": True, "False": False}.get(text, text)

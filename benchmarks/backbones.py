"""Throughput and peak memory of backbones, forward and training step: any list of timm names, in turns within one run.

    python benchmarks/backbones.py                              # the default list, eager, 224 px, batch 64
    python benchmarks/backbones.py --modes eager compile --batch 256 --models agent_swin_tiny resnet50
    python benchmarks/backbones.py --sizes 224 1024 2048 --scale-batch --models inline_swin_tiny inline_swin_tiny@global
    python benchmarks/backbones.py --modes compile cudagraphs --workers 8        # eight models compile at the same time

``NAME@global`` is the host of NAME with fused softmax attention over all tokens of each stage; ``NAME:key=value``
overrides an argument of the model. Every model has a turn in every round; the numbers are medians over rounds. bfloat16
autocast, random weights. ``captured`` is the eager step as one CUDA graph, ``compile`` torch.compile's default mode,
``cudagraphs`` its mode 'reduce-overhead'. Rows go to a CSV file as soon as they are known; rows that the file has are
skipped, and with ``--minutes`` a run stops in time, so that the next one goes on. profile_model.py says where the time
goes.
"""

import argparse
import csv
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch._dynamo
from torch import nn

import visionattn
from visionattn.layers.softmax import SoftmaxAttention

MODELS = [
    "agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny", "agent_swin_small", "agent_cswin_tiny",
    "inline_deit_tiny", "inline_pvt_tiny", "inline_swin_tiny", "inline_cswin_tiny",
    "mala_tiny", "mala_small",
    "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b1", "resnet50",
]  # fmt: skip
FIELDS = [
    "model", "task", "mode", "size", "batch", "images_per_s", "ms_per_batch", "spread", "peak_GiB", "GMACs", "Mparams",
    "channels_last", "device", "torch", "note",
]  # fmt: skip
KEY = ("model", "task", "mode", "size", "batch", "channels_last")


def build(spec: str, size: int) -> nn.Module:
    """The model of a ``name``, ``name@global`` or ``name:key=value,key=value`` at an input size."""
    name, _, overrides = spec.partition(":")
    name, _, variant = name.partition("@")
    kwargs = dict(pair.split("=") for pair in overrides.split(",")) if overrides else {}
    kwargs = {key: int(value) if value.isdigit() else value for key, value in kwargs.items()}
    if variant == "global":
        kwargs.update(attn_layer=SoftmaxAttention)
    elif variant:
        raise ValueError(f"{spec}: @{variant} is unknown: only @global is")
    try:
        return timm.create_model(name, img_size=size, drop_path_rate=0.1, **kwargs)
    except TypeError:  # fully convolutional models have no img_size
        return timm.create_model(name, drop_path_rate=0.1, **kwargs)


def gmacs(spec: str, size: int) -> float:
    """Multiply-adds of one image as PyTorch counts them (matrix products, convolutions, attention) / 1e9, on meta."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build(spec, size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2e9


class Case:
    """One model in one task and mode, ready to take turns."""

    def __init__(self, spec: str, task: str, mode: str, size: int, batch: int, channels_last: bool, device: str):
        self.row = dict(model=spec, task=task, mode=mode, size=size, batch=batch, channels_last=int(channels_last))
        self.device, self.replay = device, None
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = build(spec, size).to(device)
        self.row["Mparams"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(memory_format=layout).train(task == "train")
        self.x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
        self.y = torch.randint(1000, (batch,), device=device)
        compiled = {"compile": "default", "cudagraphs": "reduce-overhead"}
        self.forward = torch.compile(model, mode=compiled[mode]) if mode in compiled else model
        self.train = task == "train"
        if self.train:
            self.optimizer = torch.optim.AdamW(
                model.parameters(), lr=1e-5, fused=device == "cuda", capturable=mode == "captured"
            )
        if mode == "captured":
            self.replay = self.capture()
        for i in range(4):
            if i == 3 and device == "cuda" and self.replay is None:  # a replay allocates nothing
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.step()
        if device == "cuda":
            torch.cuda.synchronize()
            self.row["peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
        self.times: list[float] = []
        self.steps = max(2, min(50, round(0.25 / self.turn(2))))
        self.times.clear()

    def capture(self) -> Callable[[], None]:
        """The eager step, recorded once as a CUDA graph; its replay needs one launch from the CPU."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels, and makes the optimizer's tensors
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def step(self) -> None:
        if self.replay is not None:
            return self.replay()
        if self.row["mode"] == "cudagraphs":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device, torch.bfloat16):
            if not self.train:
                with torch.inference_mode() if self.row["mode"] == "eager" else torch.no_grad():
                    self.forward(self.x)
                return
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def turn(self, steps: int | None = None) -> float:
        """Seconds per step over a few steps."""
        steps = steps or self.steps
        if self.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(steps):
                self.step()
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            for _ in range(steps):
                self.step()
            seconds = time.perf_counter() - begin
        self.times.append(seconds / steps)
        return self.times[-1]

    def result(self) -> dict:
        median = statistics.median(self.times)
        return dict(
            self.row,
            images_per_s=round(self.row["batch"] / median, 1),
            ms_per_batch=round(1e3 * median, 3),
            spread=round((max(self.times) - min(self.times)) / median, 3),
        )


def settings() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 256  # models of one class share code, and each compiles it anew


def key_of(row: dict) -> tuple:
    return tuple(str(row[field]) for field in KEY)


def append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def free() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(group: list[tuple], args, device: str, about: dict, deadline: float) -> None:
    """Builds the cases of one group (same task, mode and size), gives them turns, and writes their rows."""
    cases, rows, costs = [], [], {}
    for case in group:
        if time.monotonic() > deadline:
            break
        spec, task, mode, size, batch = case
        row = dict(zip(KEY, (*case, int(args.channels_last)), strict=True))
        try:
            costs[spec] = round(gmacs(spec, size), 3)
        except Exception as error:  # a model whose cost can't be counted is timed all the same
            costs[spec], row["note"] = "", f"GMACs: {type(error).__name__}"
        try:
            cases.append(Case(spec, task, mode, size, batch, args.channels_last, device))
        except torch.cuda.OutOfMemoryError:
            rows.append(dict(row, note="out of memory", **about))
            free()
        except Exception as error:  # one model that fails must not cost the others their numbers
            rows.append(dict(row, note=f"{type(error).__name__}: {error}".split("\n")[0][:160], **about))
            free()
    for _ in range(args.rounds):
        for case in cases:
            case.turn()
    rows += [dict(case.result(), GMACs=costs[case.row["model"]], **about) for case in cases]
    append(args.out, rows)
    show(rows)
    del cases
    free()


COLUMNS = [("model", 34), ("task", 6), ("mode", 8), ("size", 5), ("batch", 6), ("images_per_s", 10), ("peak_GiB", 9)]


def work(build_slots, pipe, case: tuple, channels_last: bool, device: str) -> None:
    """A process with one model: builds (and compiles) it, says so, then takes a turn whenever it is told to."""
    settings()
    try:
        with build_slots:
            built = Case(*case, channels_last, device)
        free_memory = device == "cuda" and built.row["mode"] != "cudagraphs"
        if free_memory:  # the others need it meanwhile
            torch.cuda.empty_cache()
        pipe.send(dict(built.row))
        while pipe.recv() == "turn":
            for _ in range(2):  # memory comes back to this process, clocks come up
                built.step()
            built.turn()
            if free_memory:
                torch.cuda.empty_cache()
            pipe.send("taken")
        pipe.send(built.result())
    except Exception as error:
        pipe.send(dict(note=f"{type(error).__name__}: {error}".split("\n")[0][:160]))


def measure_in_processes(group: list[tuple], args, device: str, about: dict, deadline: float) -> None:
    """As ``measure``, with a process for each model, ``--workers`` of which build at the same time.

    Nothing is timed before all of them are ready, and one at a time has its turn, so that compilation in parallel
    disturbs no figure.
    """
    context = torch.multiprocessing.get_context("spawn")
    slots = context.Semaphore(args.workers)
    running, rows = [], []
    for case in group:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(slots, theirs, case, args.channels_last, device))
        process.start()
        theirs.close()
        running.append((case, process, ours))
    costs = {case[0]: round(gmacs(case[0], case[3]), 3) for case in group}
    try:
        ready = []
        for case, process, pipe in running:
            row = dict(zip(KEY, (*case, int(args.channels_last)), strict=True))
            answer = answer_of(pipe, deadline)
            if "note" in answer:
                rows.append(dict(row, **answer, **about))
                process.kill()  # what it still compiles would take time from the others' turns
                print(f"{case[0]}: {answer['note']}", flush=True)
            else:
                ready.append((case, pipe))
        print(f"{len(ready)} of {len(running)} models are ready", flush=True)
        while args.gate and not args.gate.exists():
            time.sleep(0.2)
        for _ in range(args.rounds):
            for turn in list(ready):
                case, pipe = turn
                pipe.send("turn")
                answer = answer_of(pipe, time.monotonic() + 60)
                if answer != "taken":
                    rows.append(dict(zip(KEY, (*case, int(args.channels_last)), strict=True), **answer, **about))
                    ready.remove(turn)
        for case, pipe in ready:
            pipe.send("result")
            rows.append(dict(pipe.recv(), GMACs=costs[case[0]], **about))
    finally:
        for _, process, _ in running:
            process.kill()
    append(args.out, rows)
    show(rows)


def answer_of(pipe, deadline: float) -> dict | str:
    """What a process says, or a row's note on why it says nothing."""
    try:
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            return pipe.recv()
        return dict(note="no answer in time")
    except EOFError:
        return dict(note="its process ended")


def show(rows: list[dict]) -> None:
    for row in rows:
        print(" ".join(f"{row.get(f, '')!s:>{w}}" for f, w in COLUMNS), row.get("note", ""), flush=True)


def picture(path: Path) -> None:
    """Bars of throughput per task and mode; curves over the size where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read(path) if row["images_per_s"]]
    sizes = sorted({int(row["size"]) for row in rows})
    panels = sorted({(row["task"], row["mode"]) for row in rows})
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 2, figsize=(14, 4 * len(panels)), squeeze=False, layout="constrained")
    for (task, mode), pair in zip(panels, axes, strict=True):
        chosen = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        for axis, field, label in zip(pair, ("images_per_s", "peak_GiB"), ("images / s", "peak GiB"), strict=True):
            names = list(dict.fromkeys(row["model"] for row in chosen))
            if len(sizes) > 1:
                for name in names:
                    points = sorted((int(r["size"]), float(r[field] or "nan")) for r in chosen if r["model"] == name)
                    axis.loglog(*zip(*points, strict=True), marker="o", label=name)
                axis.set_xlabel("input size, px")
                axis.legend(fontsize=7)
            else:
                axis.barh(names, [next(float(r[field] or 0) for r in chosen if r["model"] == n) for n in names])
                axis.invert_yaxis()
            axis.set_title(f"{task}, {mode}: {label}")
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tasks", nargs="+", default=["infer", "train"], choices=["infer", "train"])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "captured", "compile", "cudagraphs"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scale-batch", action="store_true", help="fewer images at larger sizes: as many pixels")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further model after this time")
    parser.add_argument("--workers", type=int, default=0, help="a process for each model, so many build at a time")
    parser.add_argument(
        "--gate", type=Path, help="with --workers: no turn before this file is there (other work is over)"
    )
    parser.add_argument("--out", type=Path, help="CSV file; the picture lies beside it")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "captured" in args.modes:
        parser.error("--modes captured: CUDA graphs need a CUDA device, and none is here; use eager or compile")
    settings()
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if args.out is None:
        label = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        args.out = (
            Path(__file__).parent / "results" / f"backbones-{label}-torch{torch.__version__.partition('+')[0]}.csv"
        )
    known = set(timm.list_models())
    unknown = [spec for spec in args.models if re.split("[:@]", spec)[0] not in known]
    if unknown:
        print(f"left out, not registered: {', '.join(unknown)}", file=sys.stderr)
        args.models = [spec for spec in args.models if spec not in unknown]
    print(f"{gpu}, torch {torch.__version__}, timm {timm.__version__}, visionattn {visionattn.__version__}", flush=True)

    about = dict(device=gpu, torch=torch.__version__)
    done = {key_of(row) for row in read(args.out)}
    deadline = time.monotonic() + 60 * args.minutes
    for mode in args.modes:
        for size in args.sizes:
            batch = max(1, round(args.batch * (args.sizes[0] / size) ** 2)) if args.scale_batch else args.batch
            for task in args.tasks:
                cases = [(spec, task, mode, size, batch) for spec in args.models]
                cases = [c for c in cases if (*map(str, c), str(int(args.channels_last))) not in done]
                if cases and time.monotonic() < deadline:
                    (measure_in_processes if args.workers else measure)(cases, args, device, about, deadline)
    picture(args.out)
    print(f"rows in {args.out}, picture beside it")


if __name__ == "__main__":
    main()

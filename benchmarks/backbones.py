"""Throughput and peak memory of backbones, forward and training step: any list of timm names, in turns within one run.

    python benchmarks/backbones.py                              # the default list, eager, 224 px, batch 64
    python benchmarks/backbones.py --modes eager compile --batch 256 --models agent_swin_tiny resnet50
    python benchmarks/backbones.py --sizes 224 1024 2048 --scale-batch --models inline_swin_tiny inline_swin_tiny@global
    python benchmarks/backbones.py --profile --models agent_swin_tiny   # where the time goes, and the share of copies

``NAME@global`` is the host of NAME with fused softmax attention over all tokens of each stage; ``NAME:key=value``
overrides an argument of the model. Every model has a turn in every round; the numbers are medians over rounds. bfloat16
autocast, random weights. Rows go to a CSV file as soon as they are known; rows that the file has are skipped, and with
``--minutes`` a run stops in time, so that the next one goes on.
"""

import argparse
import csv
import gc
import re
import statistics
import sys
import time
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
        self.device = device
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = build(spec, size).to(device)
        self.row["Mparams"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(memory_format=layout).train(task == "train")
        self.x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
        self.y = torch.randint(1000, (batch,), device=device)
        self.forward = torch.compile(model) if mode == "compile" else model
        self.train = task == "train"
        if self.train:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        for i in range(4):
            if i == 3 and device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.step()
        if device == "cuda":
            torch.cuda.synchronize()
            self.row["peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
        self.times: list[float] = []
        self.steps = max(2, min(50, round(0.25 / self.turn(2))))
        self.times.clear()

    def step(self) -> None:
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
    for row in rows:
        print(" ".join(f"{row.get(f, '')!s:>{w}}" for f, w in COLUMNS), row.get("note", ""), flush=True)
    del cases
    free()


COLUMNS = [("model", 34), ("task", 6), ("mode", 8), ("size", 5), ("batch", 6), ("images_per_s", 10), ("peak_GiB", 9)]
COPIES = re.compile(r"direct_copy|Memcpy DtoD|CatArray|roll_cuda|nchwToNhwc|nhwcToNchw|transpose|convertTensor", re.I)
CASTS = re.compile(r"float16_copy|bfloat16_copy|half_copy|LoadWithCast", re.I)


def profile(args, device: str) -> None:
    """GPU time by kernel for each model and task, and how much of it copies and casts are."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for spec in args.models:
        for task in args.tasks:
            for mode in args.modes:
                case = Case(spec, task, mode, args.sizes[0], args.batch, args.channels_last, device)
                with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                    for _ in range(3):
                        case.step()
                    if device == "cuda":
                        torch.cuda.synchronize()
                kernels: dict[str, list[float]] = {}
                for event in trace.events():
                    if event.device_type == torch.autograd.DeviceType.CUDA:
                        entry = kernels.setdefault(event.name, [0.0, 0])
                        entry[0] += event.device_time_total / 3e3
                        entry[1] += 1
                total = sum(t for t, _ in kernels.values()) or 1.0
                copies = sum(t for name, (t, _) in kernels.items() if COPIES.search(name) and not CASTS.search(name))
                casts = sum(t for name, (t, _) in kernels.items() if CASTS.search(name))
                launches = sum(n for _, n in kernels.values()) / 3
                print(
                    f"\n{spec} {task} {mode}: {total:.2f} ms of kernels in {case.turn() * 1e3:.2f} ms per step, "
                    f"{launches:.0f} launches, copies {copies / total:.1%}, casts {casts / total:.1%}"
                )
                for name, (t, n) in sorted(kernels.items(), key=lambda item: -item[1][0])[: args.top]:
                    print(f"  {t:8.3f} ms {t / total:6.1%} {n / 3:6.1f} x  {name[:150]}")
                del case
                free()


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
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scale-batch", action="store_true", help="fewer images at larger sizes: as many pixels")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further model after this time")
    parser.add_argument("--profile", action="store_true", help="kernels and the share of copies instead of throughput")
    parser.add_argument("--top", type=int, default=14, help="kernels to print with --profile")
    parser.add_argument("--out", type=Path, help="CSV file; the picture lies beside it")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 256  # models of one class share code, and each compiles it anew
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
    if args.profile:
        profile(args, device)
        return

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
                    measure(cases, args, device, about, deadline)
    picture(args.out)
    print(f"rows in {args.out}, picture beside it")


if __name__ == "__main__":
    main()

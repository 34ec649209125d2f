"""Where the time of a model goes: shares of matrix products, convolutions, norms, elementwise passes, copies.

    python benchmarks/profile_model.py mala_tiny                       # inference and training step, eager
    python benchmarks/profile_model.py mala_tiny agent_swin_tiny --modes eager compile --csv profile.csv

    VISIONATTN_KERNELS=triton python benchmarks/profile_model.py inline_deit_tiny --cpu     # what the CPU does, too

Any timm name. The first line of a run has the time of a step without a profiler, the share of it in which the GPU is
busy, and the number of kernels: where the share is low, the CPU's launches are what bounds the model. On a GPU the time
of kernels counts, under bfloat16 autocast; on a CPU that of operators. Rows: one for each class of each run, and
(``--top``) the longest kernels. ``copies`` are permutes that were materialised, casts, concatenations, paddings, rolls.
``--seconds`` starts no further run after this time.
"""

import argparse
import csv
import re
import time
from collections import Counter
from pathlib import Path

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import visionattn  # noqa: F401  registers the models

# the first pattern that a kernel's (or operator's) name matches, in lower case
CLASSES = {
    "attention": r"flash|fmha|scaled_dot_product|efficient_attention",
    "convolution": r"conv|cudnn|dgrad|wgrad|fprop|implicit|winograd|depthwise",
    "matrix product": r"gemm|gemv|matmul|cutlass|cublas|nvjet|splitk|::(add|b|badd)?mm\b|baddbmm",
    "copies": r"copy|\bcat|catarray|roll|flip|nchwtonhwc|nhwctonchw|pad|fill|memset|memcpy|index|gather|clone",
    "norm": r"norm|welford",
    "fused by the compiler": r"^triton_",
    "optimizer": r"multi_tensor|foreach|adam",
    "elementwise and reductions": (
        r"elementwise|vectorized|reduce|gelu|mul|add|div|sub|sum|mean|exp|elu|silu|softmax|pool|cmul"
    ),
}
FIELDS = ["model", "task", "mode", "size", "batch", "kind", "name", "ms_per_step", "share", "calls", "device", "torch"]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name.lower())), "other")


def step_of(model: torch.nn.Module, x: torch.Tensor, training: bool):
    """A function that makes one inference or training step (forward, backward, no optimizer)."""

    def step():
        with torch.set_grad_enabled(training), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            out = model(x)
        if training:
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    return step


def wall(step, steps: int) -> float:
    """Milliseconds of a step, without a profiler."""
    cuda = torch.cuda.is_available()
    for i in range(3 + steps):
        if i == 3:
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3 / steps


def cpu_side(step, top: int) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of what the CPU spends a step on, with the profiler's own time in it."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    rows = [(event.key, event.self_cpu_time_total / 1e3, event.count) for event in record.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:top]


def measure(step, steps: int) -> list[tuple[str, float, int]]:
    """(name, milliseconds a step, calls a step) of every kernel on a GPU, every innermost operator on a CPU."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        averages = [(event.key, event.self_cpu_time_total, event.count) for event in record.key_averages()]
    else:  # averages over thousands of launches take the profiler a minute; the kernels themselves are a short list
        times, counts = Counter(), Counter()
        for event in record.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                times[event.name] += event.device_time_total
                counts[event.name] += 1
        averages = [(name, times[name], counts[name]) for name in times]
    rows = [(name, micros / 1e3 / steps, round(count / steps)) for name, micros, count in averages if micros > 0]
    return sorted(rows, key=lambda row: -row[1])


def tell(run: dict, rows: list[tuple[str, float, int]], milliseconds: float, top: int) -> list[dict]:
    """Prints a run's classes and its longest kernels, and returns them as rows of the table."""
    total, launches = sum(ms for _, ms, _ in rows), sum(count for *_, count in rows)
    times, calls = Counter(), Counter()
    for kernel, ms, count in rows:
        times[kind_of(kernel)] += ms
        calls[kind_of(kernel)] += count
    print(
        "\n{model} {task} {mode}, {batch} x {size} px: ".format(**run)
        + f"{milliseconds:.2f} ms a step, {total:.2f} ms of {launches} kernels, busy {total / milliseconds:.0%}",
        flush=True,
    )
    table = []
    for label, entries in (
        ("class", [(kind, ms, calls[kind]) for kind, ms in times.most_common()]),
        ("kernel", rows[:top]),
    ):
        for entry, ms, count in entries:
            share = round(ms / total, 4)
            print(f"  {share:6.1%} {ms:9.3f} ms {count:5d} x  {entry[:90]}")
            table.append(run | dict(kind=label, name=entry, ms_per_step=round(ms, 4), share=share, calls=count))
    return table


def write(path: Path, table: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tasks", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=("eager", "compile"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=10, help="longest kernels to list for each run")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/profile.csv"))
    parser.add_argument("--cpu", action="store_true", help="list what the CPU spends its time on as well")
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = dict(device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
    table = []
    for name in args.models:
        for task in args.tasks:
            for mode in args.modes:
                if time.monotonic() > deadline:
                    print(f"{name} {task} {mode}: left out, the time is over")
                    continue
                torch.compiler.reset()
                model = timm.create_model(name).to(device).train(task == "train")
                x = torch.randn(args.batch, 3, args.size, args.size, device=device)
                if mode == "compile":
                    model = torch.compile(model)
                step = step_of(model, x, task == "train")
                milliseconds = wall(step, args.steps)
                rows = measure(step, args.steps)
                run = dict(model=name, task=task, mode=mode, size=args.size, batch=args.batch, **about)
                table += tell(run, rows, milliseconds, args.top)
                if args.cpu:
                    for entry, ms, count in cpu_side(step, args.top):
                        print(f"  CPU    {ms:9.3f} ms {count:5d} x  {entry[:90]}")
                write(args.csv, table)


if __name__ == "__main__":
    main()

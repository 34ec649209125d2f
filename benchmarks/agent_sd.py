"""AgentSD in a U-Net of Stable Diffusion 1.5's shape (random weights): a denoising step, dense and patched.

    python benchmarks/agent_sd.py                            # 512, 768 and 1024 px, a few minutes on a GPU
    python benchmarks/agent_sd.py --sizes 512 --ratios 0.1 0.5 --compile
    python benchmarks/agent_sd.py --budget 1 --seconds 100
    python benchmarks/agent_sd.py --device cpu --tiny --sizes 128 --budget 1        # that the script runs

A step is one call of the U-Net with both halves of classifier-free guidance. Rows: ``dense`` (PyTorch's attention);
``tome``, merged tokens alone, the late setting; ``agents``, the early setting; ``schedule``, the published 20 steps of
50 with agents and 30 without, computed from these two. Times are medians; dense is measured before and after the rest.
``launches`` and ``gpu_ms`` are the kernels of one call and the time that they themselves take, by PyTorch's profiler:
where ``ms`` is much more than that, the step waits for Python to launch them, and a patch can't make it faster.
The text encoder and the decoder are not in it. Rows are written at the end of each size, under a temporary name first.
"""

import argparse
import csv
import io
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import visionattn
from visionattn._files import atomic_write
from visionattn.diffusion.agent_sd_plan import EARLY, LATE

COLUMNS = (
    "device", "torch", "dtype", "mode", "size", "ratio", "row", "ms", "dense_over_row", "gpu_ms", "launches",
    "peak_gib", "calls",
)  # fmt: skip


def build(tiny: bool, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Stable Diffusion 1.5's U-Net, or a small one of its form, with random weights."""
    shape = dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64
    )  # fmt: skip
    if tiny:
        shape.update(block_out_channels=(32, 32, 32, 32), layers_per_block=1, cross_attention_dim=768)
    torch.manual_seed(0)
    return UNet2DConditionModel(**shape).to(device, dtype).eval().requires_grad_(False)


def seconds(call, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def kernels(call, device: str) -> tuple[float | None, int | None]:
    """Milliseconds of a call's kernels and copies alone, and how many there are; None without a GPU."""
    if device == "cpu":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    ran = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in ran) / 1000, len(ran)


@torch.no_grad()
def times(unet: torch.nn.Module, inputs: tuple, name: str, ratio: float | None, args: argparse.Namespace) -> tuple:
    """Each call's seconds, :func:`kernels`, and peak memory in GiB of one row; an error if it ran something else."""
    if args.compile:
        torch._dynamo.reset()  # a patch's hooks are part of the graphs
    handle = None
    if ratio is not None:
        cells = EARLY if name == "agents" else LATE
        handle = visionattn.agent_sd(unet, ratio, sx=cells.sx, sy=cells.sy, agent_ratio=cells.agent_ratio)
    try:
        for _ in range(2):
            unet(*inputs)
        if args.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        took, start = [], time.time()
        while len(took) < 3 or (time.time() - start < args.budget and len(took) < 30):
            took.append(seconds(lambda: unet(*inputs), args.device))
        if handle is not None:
            plans = [block.plan for block in handle.sessions[0].blocks if block.plan is not None]
            agents = [plan for plan in plans if plan.agents is not None]
            if not plans or len(agents) != (len(plans) if name == "agents" else 0):
                raise RuntimeError(f"{name} at ratio {ratio} did not run as such:\n{handle.report()}")
        peak = None if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
        return took, kernels(lambda: unet(*inputs), args.device), peak
    finally:
        if handle is not None:
            handle.remove()


def measure(unet: torch.nn.Module, size: int, args: argparse.Namespace) -> list[tuple]:
    """(ratio, row, seconds, dense over row, GPU ms, launches, peak, calls) of one size; dense before and after."""
    side = size // 8
    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    inputs = (torch.randn(2, 4, side, side, **kind), 981, torch.randn(2, 77, 768, **kind))
    dense, ran, peak = times(unet, inputs, "dense", None, args)
    rows = [(r, name, *times(unet, inputs, name, r, args)) for r in args.ratios for name in ("tome", "agents")]
    dense += times(unet, inputs, "dense", None, args)[0]
    whole = statistics.median(dense)
    out = [(None, "dense", whole, 1.0, *ran, peak, len(dense))]
    for ratio, name, took, ran, peak in rows:
        s = statistics.median(took)
        out.append((ratio, name, s, whole / s, *ran, peak, len(took)))
    for ratio in args.ratios:
        late, early = ((statistics.median(row[2]), row[3][0]) for row in rows if row[0] == ratio)
        mean, busy = ((20 * a + 30 * b) / 50 if a else None for a, b in zip(early, late, strict=True))
        out.append((ratio, "schedule", mean, whole / mean, busy, None, None, None))
    return out


def write(path: Path, table: list[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(table)
    atomic_write(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024], help="of the picture, in pixels")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="shares of merged tokens")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compile", action="store_true", help="compiled transformer blocks (whole graphs)")
    parser.add_argument("--tiny", action="store_true", help="a small U-Net of the same form")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds to measure one row")
    parser.add_argument("--seconds", type=float, default=600.0, help="no new size after this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.time()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: use --device cpu --tiny to see that the script runs")
    if any(size % 64 for size in args.sizes):
        parser.error(f"--sizes {args.sizes}: give multiples of 64")
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(0)
    version = torch.__version__.split("+")[0]
    slug = name.lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / f"agent_sd-{slug}-torch{version}.csv"
    unet = build(args.tiny, args.device, getattr(torch, args.dtype if args.device != "cpu" else "float32"))
    args.dtype = args.dtype if args.device != "cpu" else "float32"
    mode = "compiled" if args.compile else "eager"
    if args.compile:
        unet.compile_repeated_blocks(fullgraph=True)
    if args.tiny:
        mode += ", tiny"
    table: list[tuple] = []
    for size in args.sizes:
        if time.time() - started > args.seconds:
            print(f"{size} px: left out, the time is up", flush=True)
            continue
        for ratio, row, s, gain, busy, launches, peak, calls in measure(unet, size, args):
            values = (ratio, row, round(1000 * s, 3), round(gain, 3), busy and round(busy, 3), launches)
            values += (peak and round(peak, 2), calls)
            table.append((name, version, args.dtype, mode, size, *values))
            print(size, *values, flush=True)
        write(out, table)
    print(f"written to {out}")


if __name__ == "__main__":
    main()

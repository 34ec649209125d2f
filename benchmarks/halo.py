"""Halo attention against timm's: one layer at a time, and whole networks that differ in that layer only.

    python benchmarks/halo.py                       # all of it, about 15 minutes on an H100
    python benchmarks/halo.py --parts network --models halo_h1 --modes eager compile

Peers run in turns within one process. Times are medians of GPU time; nothing is timed before outputs agree.
Writes benchmarks/results/halo-<gpu>-torch<version>.csv (or --out), and prints a table.
"""

import argparse
import copy
import csv
import gc
import re
import statistics
from pathlib import Path

import timm
import torch
import triton
from timm.layers.halo_attn import HaloAttn
from torch import nn

import visionattn
from visionattn.layers.halo import HaloAttention

# name: batch, map, channels, output channels, stride, heads, block, halo
LAYERS = {
    "h1 stage 1": (64, 64, 64, 64, 1, 4, 8, 3),
    "h1 stage 2 strided": (64, 64, 128, 128, 2, 8, 8, 3),
    "h1 stage 2": (64, 32, 128, 128, 1, 8, 8, 3),
    "h1 stage 3 strided": (64, 32, 256, 256, 2, 16, 8, 3),
    "h1 stage 3": (64, 16, 256, 256, 1, 16, 8, 3),
    "h1 stage 4 strided": (64, 16, 512, 512, 2, 32, 8, 3),
    "h1 stage 4": (64, 8, 512, 512, 1, 32, 8, 3),
    "h3 stage 1": (64, 80, 64, 64, 1, 4, 10, 3),
    "h4 stage 1": (64, 96, 64, 64, 1, 4, 12, 2),
    "h4 stage 2 strided": (64, 96, 128, 128, 2, 8, 12, 2),
    "h5 stage 1": (16, 112, 64, 160, 1, 4, 14, 2),
    "h6 stage 1": (16, 128, 64, 192, 1, 4, 8, 4),
    "h7 stage 1": (16, 160, 64, 256, 1, 4, 10, 3),
}
NETWORKS = {"halo_h0": 256, "halo_h1": 256, "halo_h2": 256, "halo_h4": 384}


def timm_layer(ours: HaloAttention) -> HaloAttn:
    """timm's layer with the same dimensions and weights."""
    layer = HaloAttn(
        ours.q.in_channels, ours.num_heads * ours.dim_head_v, stride=ours.stride, num_heads=ours.num_heads,
        dim_head=ours.dim_head, block_size=ours.block_size, halo_size=ours.halo_size,
        scale_pos_embed=ours.scale_pos_embed,
    )  # fmt: skip
    layer.load_state_dict(ours.state_dict())
    return layer.to(ours.q.weight.device)


def with_timm_layers(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, HaloAttention)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no HaloAttention to replace")
    for name, module in found:
        model.set_submodule(name, timm_layer(module))
    return model.to(memory_format=torch.channels_last)


def measure(run, repeats: int) -> tuple[list[float], float]:
    """Milliseconds of each repeat, and the peak of memory above what was there before, in MiB."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times, (torch.cuda.max_memory_allocated() - before) / 2**20


def in_turns(runs: dict, warmup: int, repeats: int, rounds: int = 3) -> dict:
    """Median time and peak memory of each; a run that does not fit is left out and said so."""
    times, peaks = {name: [] for name in runs}, {}
    for name, run in list(runs.items()):
        try:
            for _ in range(warmup):
                run()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            print(f"  {name}: out of memory")
            del times[name]
        torch.cuda.empty_cache()
    for _ in range(rounds):
        for name in times:
            some, peaks[name] = measure(runs[name], repeats)
            times[name] += some
    return {name: (statistics.median(t), peaks[name]) for name, t in times.items()}


def agree(one, other, what: str, limit: float = 0.03) -> None:
    error = ((one.float() - other.float()).norm() / other.float().norm()).item()
    if not error <= limit:
        raise RuntimeError(f"{what}: outputs differ by {error:.3g}, so nothing is timed")


def bench_layers(names, report) -> None:
    for name in names:
        batch, size, dim, dim_out, stride, heads, block, halo = LAYERS[name]
        torch.manual_seed(0)
        ours = HaloAttention(
            dim, dim_out, stride=stride, num_heads=heads, dim_head=16, block_size=block, halo_size=halo
        ).cuda()
        eager = copy.deepcopy(ours)
        eager.backend = "reference"
        layers = {"timm": timm_layer(ours), "reference": eager, "ours": ours}
        x = torch.randn(batch, dim, size, size, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn(batch, dim_out, size // stride, size // stride, device="cuda", dtype=torch.bfloat16)
        grad = grad.to(memory_format=torch.channels_last)

        def forward(layer, x=x):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                return layer(x)

        def train(layer, x=x, grad=grad):
            with torch.autocast("cuda", torch.bfloat16):
                out = layer(x)
            torch.autograd.grad(out, [x, *layer.parameters()], grad)

        agree(forward(ours), forward(layers["timm"]), name)
        for mode, run in (("forward", forward), ("forward+backward", train)):
            result = in_turns({n: (lambda m=m, run=run: run(m)) for n, m in layers.items()}, 3, 7)
            report(name, "eager", mode, batch, size, result)
        del layers, ours, eager, x, grad
        gc.collect()
        torch.cuda.empty_cache()


def bench_networks(names, modes, batch, report) -> None:
    for name in names:
        size = NETWORKS[name]
        torch.manual_seed(0)
        ours = timm.create_model(name).cuda().to(memory_format=torch.channels_last)
        models = {"timm": with_timm_layers(ours), "ours": ours}
        if name == "halo_h1":
            models["timm halonet_h1"] = timm.create_model("halonet_h1").cuda().to(memory_format=torch.channels_last)
        x = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
        target = torch.randint(0, 1000, (batch,), device="cuda")
        for model in models.values():
            model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            agree(models["ours"](x[:8]), models["timm"](x[:8]), name, 0.06)
        optimizers = {n: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9) for n, m in models.items()}
        for mode in modes:
            programs = models if mode == "eager" else {n: torch.compile(m) for n, m in models.items()}

            def infer(n, programs=programs, x=x):
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                    programs[n](x)

            def step(n, programs=programs, x=x, target=target, optimizers=optimizers):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(programs[n](x), target)
                optimizers[n].zero_grad(set_to_none=True)
                loss.backward()
                optimizers[n].step()

            for m in models.values():
                m.eval()
            runs = {n: (lambda n=n: infer(n)) for n in models}
            report(name, mode, "inference", batch, size, in_turns(runs, 3, 7))
            for m in models.values():
                m.train()
            runs = {n: (lambda n=n: step(n)) for n in models}
            report(name, mode, "training step", batch, size, in_turns(runs, 3, 5))
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            torch._dynamo.reset()
        del models, programs, ours, optimizers
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["layer", "network"], choices=["layer", "network"])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    version = torch.__version__.split("+")[0]
    out = args.out or Path(__file__).parent / "results" / f"halo-{gpu}-torch{version}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = [torch.cuda.get_device_name(), torch.__version__, triton.__version__, timm.__version__]
    environment.append(visionattn.__version__)

    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ["what", "mode", "pass", "implementation", "batch", "size", "ms", "images_per_s", "peak_mib"]
        columns += ["speed_over_timm", "memory_over_timm", "gpu", "torch", "triton", "timm", "visionattn"]
        writer.writerow(columns)

        def report(what, mode, step, batch, size, result) -> None:
            for name, (ms, peak) in result.items():
                ratios = ["", ""]
                if "timm" in result:
                    ratios = [f"{result['timm'][0] / ms:.2f}", f"{peak / result['timm'][1]:.3f}"]
                row = [
                    what,
                    mode,
                    step,
                    name,
                    batch,
                    size,
                    f"{ms:.3f}",
                    f"{1e3 * batch / ms:.0f}",
                    f"{peak:.0f}",
                    *ratios,
                ]
                writer.writerow([*row, *environment])
                print(
                    f"{what:19} {mode:8}{step:17}{name:16}{ms:9.3f} ms {1e3 * batch / ms:8.0f}/s {peak:7.0f} MiB",
                    end="",
                )
                print(f"  x{ratios[0]}, memory x{ratios[1]}" if name != "timm" and ratios[0] else "", flush=True)
            file.flush()

        if "layer" in args.parts:
            bench_layers(args.layers, report)
        if "network" in args.parts:
            bench_networks(args.models, args.modes, args.batch, report)


if __name__ == "__main__":
    main()

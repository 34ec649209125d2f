"""One FLUX.1 step on several GPUs (random weights, few layers): Ulysses and bands with exact halos against one GPU.

    torchrun --nproc-per-node 2 benchmarks/parallel.py                   # 4096 px, about a minute on two H100s
    torchrun --nproc-per-node 2 benchmarks/parallel.py --device cpu --tiny     # that the script runs

Every process has all weights, from one seed. ``alone`` is the whole step on one GPU, all of them at once; ``ulysses``
and ``halo`` are ``ContextParallelConfig`` with ``ulysses_degree`` and ``ring_degree`` (patched: exact halo exchange;
dense: diffusers' own ring, not on a CPU). Times are the slowest process's median, of GPU time after a barrier.
``error`` is the largest difference from ``alone`` with the same attention, ``of`` the largest value there; bfloat16.
``blocks_ms`` are a double and a single block's share, from which ``scaled_ms`` computes 19 and 38 of them.
"""

import argparse
import datetime
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from flux import PATTERNS, build, inputs, milliseconds, shape, write_csv
from video import BlockTimer

from visionattn import Disk, Neighborhood
from visionattn.diffusion import sparsify

COLUMNS = (
    "gpu", "torch", "processes", "size", "attention", "how", "ms", "over_alone", "scaled_ms", "scaled_over_alone",
    "blocks_ms", "error", "of", "peak_gib", "calls",
)  # fmt: skip
LISTS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
TINY = {"disk16": Disk(4), "window80s16": Neighborhood(8, stride=4)}


def model_of(args: argparse.Namespace, how: str, size: int) -> torch.nn.Module:
    """The same weights each time, spread as ``how`` says."""
    torch.manual_seed(0)
    model = build(args.double, args.single, args.device, args.tiny)
    if args.device != "cpu":  # PyTorch's own choice has no ring attention
        model.set_attention_backend("_native_cudnn")
    if how != "alone":
        degrees = {"ulysses": dict(ulysses_degree=size), "halo": dict(ring_degree=size)}[how]
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    return model


@torch.no_grad()
def measure(model, call: dict, args: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """Medians over calls of the slowest process, and the output."""
    timer = BlockTimer(model, LISTS, args.device)
    (out,) = model(**call)
    timer.take()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for _ in range(args.calls):
        dist.barrier()
        whole = milliseconds(lambda: model(**call), args.device)
        each = timer.take()
        rows.append([whole, *(sum(each[name]) / len(each[name]) for name in LISTS)])
    found = torch.tensor(rows, device=args.device).median(0).values
    dist.all_reduce(found, dist.ReduceOp.MAX)
    whole, *blocks = found.tolist()
    counts = {name: len(getattr(model, name)) for name in LISTS}
    scaled = whole + sum((LISTS[n] - counts[n]) * ms for n, ms in zip(LISTS, blocks, strict=True))
    peak = None if args.device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for handle in timer.handles:
        handle.remove()
    return dict(ms=round(whole, 2), scaled_ms=round(scaled, 1), blocks_ms=" ".join(f"{b:.2f}" for b in blocks),
                peak_gib=peak, calls=args.calls), out  # fmt: skip


def row(args: argparse.Namespace, attention: str, how: str, call: dict, alone: dict) -> dict:
    model = model_of(args, how, dist.get_world_size())
    if attention == "dense":
        found, out = measure(model, call, args)
    else:
        pattern = TINY[attention] if args.tiny else PATTERNS[attention]
        with sparsify(model, pattern) as handle:
            found, out = measure(model, call, args)
            reasons = {r["reason"] for r in handle.report().rows} - {None}
        if reasons:
            raise RuntimeError(f"stayed dense: {reasons.pop()}")
    if how == "alone":
        alone[attention] = (found, out)
    elif attention in alone:
        before, expected = alone[attention]
        error = torch.stack([(out - expected).abs().max().float(), expected.abs().max().float()])
        dist.all_reduce(error, dist.ReduceOp.MAX)
        found |= {
            "over_alone": round(before["ms"] / found["ms"], 3),
            "scaled_over_alone": round(before["scaled_ms"] / found["scaled_ms"], 3),
            "error": f"{error[0].item():.3g}", "of": f"{error[1].item():.3g}",
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="of the picture, in pixels")
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=80.0, help="no new row after this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a narrow network and few tokens: that the script runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 benchmarks/parallel.py")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: use --device cpu --tiny to see that the script runs")
    if args.tiny:
        args.size = 256
    started = time.time()
    if args.device == "cpu":
        torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides the rank by it, and a CPU has none
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=datetime.timedelta(minutes=2))
    first = dist.get_rank() == 0
    gpu = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(0)
    version = torch.__version__.split("+")[0]
    default = Path(__file__).parent / "results" / f"parallel-{gpu.lower().replace(' ', '-')}-torch{version}.csv"
    out, table, alone = args.out or default, [], {}
    torch.manual_seed(1)
    call = inputs(args.size, args.device, shape(args.tiny)["joint_attention_dim"])
    about = dict(gpu=gpu, torch=version, processes=dist.get_world_size(), size=args.size)
    order = [("disk16", how) for how in ("alone", "ulysses", "halo")]
    order += [("dense", "alone"), ("dense", "ulysses"), ("window80s16", "alone"), ("window80s16", "ulysses")]
    order += [("window80s16", "halo"), ("dense", "halo")]
    for attention, how in order:
        late = torch.tensor(float(time.time() - started > args.seconds), device=args.device)
        dist.all_reduce(late, dist.ReduceOp.MAX)  # all stop before the same row
        if late:
            print(f"{attention} {how}: left out, the time is up", flush=True) if first else None
            continue
        try:
            found = row(args, attention, how, call, alone)
        except (ValueError, RuntimeError, NotImplementedError) as e:  # at all processes, or the others' timeout ends it
            print(
                f"{attention} {how}: failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:150]}", flush=True
            )
            continue
        if first:
            table.append(dict(**about, attention=attention, how=how, **found))
            write_csv(out, COLUMNS, table)
            print(attention, how, found, flush=True)
    if first:
        print(f"written to {out}; {time.time() - started:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

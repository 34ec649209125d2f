"""A denoising step of FLUX.1-dev's exact architecture (random weights): dense against patched, eager and compiled.

    python benchmarks/flux.py                          # 1024 to 8192 px; about 8 minutes on an H100
    python benchmarks/flux.py --sizes 4096 --rows disk16 --compile --seconds 120

Dense is cuDNN's attention in the same run. Times are medians of GPU time. At 8192 px the dense step is one double and
one single block times their number plus the measured rest, and the row says so. ``stub`` replaces attention by its
queries: what is left is everything else. Rows are written as they come.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import visionattn
from visionattn.diffusion import dispatch, sparsify

PATTERNS = {
    "disk8": visionattn.Disk(8),
    "disk16": visionattn.Disk(16),
    "disk32": visionattn.Disk(32),
    "window80s16": visionattn.Neighborhood(80, stride=16),
}
COLUMNS = ("gpu", "torch", "size", "row", "mode", "ms", "over_dense", "peak_gib", "how")


def build(double: int = 19, single: int = 38) -> torch.nn.Module:
    """FLUX.1-dev's transformer with random weights in bfloat16, made on the GPU."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0.0, 0.02) if p.ndim > 1 else p.fill_(1.0 if p.shape == (128,) else 0.0)
    return model


def inputs(size: int) -> dict:
    side = size // 16
    ids = torch.zeros(side, side, 3, device="cuda")
    ids[..., 1] = torch.arange(side, device="cuda")[:, None]
    ids[..., 2] = torch.arange(side, device="cuda")[None, :]
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    return dict(
        hidden_states=torch.randn(1, side * side, 64, **kind), encoder_hidden_states=torch.randn(1, 512, 4096, **kind),
        pooled_projections=torch.randn(1, 768, **kind), timestep=torch.full((1,), 0.5, **kind),
        img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(512, 3, device="cuda"), guidance=torch.full((1,), 3.5, **kind),
        return_dict=False,
    )  # fmt: skip


@torch.no_grad()
def measure(model: torch.nn.Module, call: dict, budget: float) -> tuple[float, float]:
    """Median milliseconds of a step within `budget` seconds, and peak memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    model(**call)
    torch.cuda.synchronize()
    times, start = [], time.time()
    while len(times) < 10 and (len(times) < 2 or time.time() - start < budget):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(**call)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


class Backend:
    """Attention of all processors, set for a block of code."""

    def __init__(self, model: torch.nn.Module, backend):
        self.processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
        self.backend = backend

    def __enter__(self) -> None:
        for p in self.processors:
            p._attention_backend = self.backend

    def __exit__(self, *exc) -> None:
        for p in self.processors:
            p._attention_backend = None


def stub(query, key, value):
    return query


def dense_by_blocks(model: torch.nn.Module, call: dict, rest: float, cudnn) -> float:
    """A dense step from the attention of one double and one single block; `rest` is the step without attention."""
    n = call["hidden_states"].shape[1] + 512
    q = torch.randn(1, n, 24, 128, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        dispatch.dense(q, q, q, backend=cudnn)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    return rest + blocks * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rows", nargs="+", default=["disk16", "window80s16"], choices=list(PATTERNS))
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks (regional, whole graphs)")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a measurement may take")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new row after this")
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name(0)
    torch_version = torch.__version__.split("+")[0]
    slug = gpu.lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / f"flux-{slug}-torch{torch_version}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    model = build(args.double, args.single)
    cudnn = dispatch.AttentionBackendName._NATIVE_CUDNN
    nothing = dispatch.add_backend(stub)
    with out.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        for mode in ["eager", "compiled"] if args.compile else ["eager"]:
            if mode == "compiled":
                model.compile_repeated_blocks(fullgraph=True)
            for size in args.sizes:
                call, dense = inputs(size), None
                for row in ["stub", "dense", *args.rows]:
                    if time.time() - started > args.seconds:
                        print(f"{size} px {row} {mode}: left out, the time is up", flush=True)
                        continue
                    how, ms, peak = "measured", None, None
                    try:
                        if row == "stub":
                            with Backend(model, nothing):
                                ms, peak = rest, _ = measure(model, call, args.budget)
                        elif row == "dense" and size >= 8192:
                            ms, how = dense_by_blocks(model, call, rest, cudnn), "one attention x blocks + rest"
                        elif row == "dense":
                            with Backend(model, cudnn):
                                ms, peak = measure(model, call, args.budget)
                        else:
                            with Backend(model, cudnn), sparsify(model, PATTERNS[row]) as handle:
                                ms, peak = measure(model, call, args.budget)
                                reasons = {r["reason"] for r in handle.report().rows} - {None}
                                how = f"dense: {reasons.pop()}" if reasons else how
                    except Exception as e:
                        how = f"failed: {type(e).__name__}: {str(e).splitlines()[0][:120]}"
                    dense = ms if row == "dense" else dense
                    ratio = round(dense / ms, 3) if dense and ms and row != "stub" else None
                    values = (ms and round(ms, 2), ratio, peak and round(peak, 2))
                    writer.writerow((gpu, torch_version, size, row, mode, *values, how))
                    f.flush()
                    print(size, row, mode, *values, how, flush=True)
    print(f"written to {out}")


if __name__ == "__main__":
    main()

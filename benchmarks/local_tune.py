"""Tile sizes of every kernel of local attention, one after another, on one machine.

    python benchmarks/local_tune.py                              # about a minute on an H100
    python benchmarks/local_tune.py --kernels forward query      # some kernels

Candidates are compiled first, by several processes. Writes
benchmarks/results/local_attention-tune-<gpu>-torch<version>.csv row by row (or --out).
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from local_attention import DIM, HEADS, TEXT, Report, clock, flops, make, outputs, result_path
from local_peers import first_line

from visionattn.ops.local import Disk, Neighborhood, fused
from visionattn.ops.local.tiles import Tile

# Tuning: (kernel, case) and the tiles to try. Query tile, key tile, warps, stages, descriptors.

A, B2, C2 = (1, 8, 8), (1, 8, 16), (1, 16, 16)
CASES = {
    "disk": ((256, 256), Disk(16), TEXT),
    "window": ((256, 256), Neighborhood(80, 16), 0),
    "video": ((30, 48, 80), Neighborhood((18, 24, 24), (2, 8, 8)), 0),
    "nat": ((56, 56), Neighborhood(7), 0),
}
CANDIDATES = {
    ("forward", "disk"): [
        (A, A, 4, 3, True), (A, A, 4, 2, True), (A, A, 4, 4, True), (A, A, 4, 3, False), (A, (1, 4, 8), 4, 4, True),
        (A, (1, 8, 16), 4, 2, True), (B2, A, 8, 3, True), (B2, A, 8, 2, True), (B2, A, 8, 4, True), (B2, A, 4, 3, True),
        (B2, (1, 4, 8), 8, 4, True), (B2, (1, 4, 16), 8, 3, True), (B2, B2, 8, 2, True), (B2, A, 8, 3, False),
        ((1, 16, 8), A, 8, 3, True), (C2, A, 8, 3, True),
    ],
    ("forward", "window"): [
        (B2, A, 8, 3, True), (B2, A, 8, 4, True), (B2, B2, 8, 2, True), (B2, B2, 8, 3, True), (B2, A, 4, 3, True),
        (C2, A, 8, 3, True), (A, A, 4, 3, True), (B2, A, 8, 3, False), (C2, B2, 8, 2, True), (A, B2, 4, 2, True),
    ],
    ("forward", "video"): [
        ((2, 8, 8), (2, 4, 8), 8, 3, True), ((2, 8, 8), (2, 8, 8), 8, 2, True), ((2, 8, 8), (2, 8, 8), 8, 3, True),
        ((2, 8, 8), (1, 8, 8), 8, 3, True), ((2, 8, 8), (2, 4, 8), 4, 3, True), ((2, 8, 8), (2, 4, 8), 8, 3, False),
    ],
    ("dense", "disk"): [
        (B2, A, 8, 3, True), (B2, A, 8, 4, True), (B2, B2, 8, 2, True), (B2, B2, 8, 3, True), (A, A, 4, 3, True),
        (B2, A, 4, 3, True), (C2, A, 8, 3, True),
    ],
    ("query", "disk"): [
        (B2, A, 8, 2, True), (B2, A, 8, 3, True), (A, A, 4, 2, True), (A, A, 4, 3, True), (A, (1, 4, 8), 4, 3, True),
        (B2, (1, 4, 8), 8, 3, True), (B2, A, 8, 2, False),
    ],
    ("query", "window"): [
        (B2, A, 8, 2, True), (B2, A, 8, 3, True), (A, A, 4, 2, True), (A, A, 4, 3, True), (B2, B2, 8, 1, True),
        (B2, (1, 4, 8), 8, 3, True),
    ],
    ("backward_keys", "disk"): [
        (A, B2, 8, 2, True), (A, A, 4, 2, True), (A, A, 4, 3, True), (A, A, 8, 2, True), ((1, 4, 8), B2, 8, 3, True),
        ((1, 4, 8), A, 4, 3, True), (A, B2, 8, 1, True),
    ],
    ("backward_keys", "window"): [
        (A, B2, 8, 2, True), (A, A, 4, 2, True), (A, A, 4, 3, True), (A, A, 8, 2, True), ((1, 4, 8), B2, 8, 3, True),
        ((1, 4, 8), A, 4, 3, True), (B2, A, 8, 1, True),
    ],
    ("forward", "nat"): [
        (A, A, 4, 2, False), (A, A, 4, 1, False), (A, A, 2, 1, False), (A, A, 2, 2, False),
        (A, (1, 16, 16), 4, 1, False),
        (A, (1, 4, 16), 4, 2, False), (A, (1, 16, 8), 4, 1, False), (A, (1, 2, 16), 4, 2, False),
        ((1, 8, 16), A, 4, 1, False), ((1, 4, 8), (1, 4, 16), 2, 1, False), ((1, 4, 8), (1, 16, 16), 2, 1, False),
    ],
    ("query", "nat"): [
        (A, A, 4, 1, False), (A, A, 4, 2, False), (A, A, 2, 1, False), (A, (1, 4, 16), 4, 1, False),
        (A, (1, 16, 8), 4, 1, False), ((1, 4, 8), (1, 4, 16), 2, 1, False), ((1, 4, 4), (1, 4, 4), 1, 1, False),
    ],
    ("backward_keys", "nat"): [
        (A, A, 4, 1, False), (A, A, 4, 2, False), (A, A, 2, 1, False), ((1, 4, 16), A, 4, 1, False),
        ((1, 16, 8), A, 4, 1, False), ((1, 4, 8), A, 2, 1, False), ((1, 4, 4), (1, 4, 8), 1, 1, False),
    ],
}  # fmt: skip


def tune_run(kind: str, case: str, candidate):
    """A call of one kernel with these tiles, and its executed FLOP."""
    grid, pattern, text = CASES[case]
    biased = case == "nat"
    batch, heads, dim = (64, 2, 32) if biased else (1, HEADS, DIM)
    q, k, v = make(grid, text, batch, heads, dim)
    bias = torch.randn(heads, 13, 13, device="cuda", dtype=torch.bfloat16) if biased else None
    *shape, tma = candidate
    tile = Tile(*shape)
    settings = (grid, pattern, text, True, dim**-0.5)
    tiles = replace(fused.plan(q, k, v, None, None, bias, None, *settings).tiles, **{kind: tile}, tma=tma)
    p = fused.plan(q, k, v, None, None, bias, None, *settings, tiles)
    out, lse = outputs(q)
    f = flops(grid, pattern, text, tile, heads, dim, batch)
    if kind == "forward":
        return lambda: fused.grid_forward(p, q, k, v, None, None, bias, None, out, lse), f["executed image"]
    if kind == "dense":
        return lambda: fused.text_forward(p, q, k, v, None, out, lse), f["text"]
    lse.fill_(12)
    delta, grad, dq, dk = torch.zeros_like(lse), torch.randn_like(q), torch.empty_like(q), torch.empty_like(q)
    dv = torch.empty_like(q)
    if kind == "query":
        run = lambda: fused.query_grad(p, p.tma, q, k, v, grad, None, None, bias, None, lse, delta, dq)  # noqa: E731
        return run, f["executed image"] * 1.5
    f = flops(grid, pattern, text, Tile(tile.key, tile.query, 1, 1), heads, dim, batch)
    return lambda: fused.key_grad(p, p.tma, q, k, v, grad, bias, lse, delta, dk, dv), f["executed image"] * 2


def tune(report, only, workers: int) -> None:
    work = [(kind, case, c) for (kind, case), list_ in CANDIDATES.items() for c in list_ if not only or kind in only]
    script = [sys.executable, __file__, *(["--kernels", *only] if only else [])]
    shards = [subprocess.Popen([*script, "--shard", str(i), str(workers)]) for i in range(workers)]
    for shard in shards:
        shard.wait()
    print(f"  [{clock():5.0f} s] compiled", flush=True)
    for kind, case, candidate in work:
        try:
            run, f = tune_run(kind, case, candidate)
        except Exception as e:
            print(f"    {kind} {case} {candidate}: {first_line(e)}")
            continue
        report.measure(f"tune {kind}", case, str(candidate).replace(",", ""), partial(lambda run: run, run), None, f)
        del run


def warm(index: int, workers: int, only) -> None:
    """Compiles every n-th candidate, for Triton's cache."""
    work = [(kind, case, c) for (kind, case), list_ in CANDIDATES.items() for c in list_ if not only or kind in only]
    for item in work[index::workers]:
        try:
            tune_run(*item)[0]()
            torch.cuda.synchronize()
        except Exception as e:
            print(f"    {item}: {first_line(e)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=sorted({k for k, _ in CANDIDATES}), help="what to tune")
    parser.add_argument("--workers", type=int, default=10, help="processes that compile candidates")
    parser.add_argument("--shard", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if args.shard:
        warm(*args.shard, args.kernels)
        return
    tune(Report(args.out or result_path("local_attention-tune"), fresh=True), args.kernels, args.workers)


if __name__ == "__main__":
    main()

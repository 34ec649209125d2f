"""Triton kernels of linear attention beside what memory allows, for a few tiles each: where their settings come from.

    python benchmarks/linear_kernels.py                      # batch 64, bfloat16, the published shapes at 224 px
    python benchmarks/linear_kernels.py --seconds 30 --csv tune.csv

Rows: operator, shape, tokens and warps of a program, microseconds (median), bytes that have to move / time in TB/s, and
for the depthwise residual and InLine what PyTorch's operators take. Needs a GPU.
"""

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

from visionattn.ops import depthwise_triton, inline_triton, mala_triton
from visionattn.ops.depthwise import depthwise_residual
from visionattn.ops.inline import inline_mix
from visionattn.ops.linear import mala_mix, rotary_lines, rotary_tables

TILES = [(64, 4), (32, 4), (64, 8), (16, 4), (128, 8)]
FIELDS = ["operator", "shape", "block_n", "warps", "us", "TB/s", "device", "torch", "triton"]


def depthwise(batch: int, side: int, width: int, prefix: int) -> tuple[Callable, int]:
    tokens = prefix + side * side
    v = torch.randn(batch, tokens, width, device="cuda", dtype=torch.bfloat16)
    out, weight = torch.randn_like(v), torch.randn(1, width, 9, device="cuda")
    bias = torch.randn(width, device="cuda")

    def run(backend: str) -> None:
        depthwise_residual(out, v, weight, bias, (side, side), prefix, backend)

    return run, 3 * v.numel() * 2


def inline(batch: int, side: int, width: int, prefix: int) -> tuple[Callable, int]:
    tokens = prefix + side * side
    qkv = torch.randn(batch, tokens, 3 * width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(batch, width, 9, device="cuda", dtype=torch.bfloat16)

    def run(backend: str) -> None:
        q, k, v = qkv.chunk(3, dim=2)
        inline_mix(q, k, v, weight, None, width // 32, (side, side), prefix, backend=backend)

    return run, 4 * qkv.numel() // 3 * 2


def mala(batch: int, side: int, width: int, prefix: int) -> tuple[Callable, int]:
    qkvo = torch.randn(batch, side * side, 4 * width, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(width, 1, 5, 5, device="cuda"), torch.randn(width, device="cuda")
    lines = rotary_lines(side, 64, torch.device("cuda"))
    sin, cos = (table.to(qkvo.dtype) for table in rotary_tables(lines, lines))

    def run(backend: str) -> None:
        mala_mix(qkvo, weight, bias, sin, cos, width // 64, (side, side), backend)

    return run, 5 * qkvo.numel() // 4 * 2


CASES = [  # operator, its module, (side, width, prefix)
    (mala, mala_triton, (56, 64, 0)),
    (depthwise, depthwise_triton, (56, 224, 0)),
    (depthwise, depthwise_triton, (14, 192, 1)),
    (inline, inline_triton, (14, 192, 1)),
    (mala, mala_triton, (28, 128, 0)),
    (depthwise, depthwise_triton, (14, 896, 0)),
    (depthwise, depthwise_triton, (56, 64, 0)),
    (inline, inline_triton, (56, 96, 0)),
]


def set_tile(module, block_n: int, warps: int) -> None:
    module.BLOCK_N, module.WARPS = block_n, warps
    module._plans.known.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    rows = []
    for operator, module, shape in CASES:
        run, moved = operator(args.batch, *shape)
        plain = "matmul" if operator is not depthwise else "conv"
        defaults = (module.BLOCK_N, module.WARPS)
        for tile in [None, *TILES]:
            if time.monotonic() > deadline:
                break
            if tile is not None:
                set_tile(module, *tile)
            backend = plain if tile is None else "triton"
            with torch.no_grad():
                us = 1e3 * triton.testing.do_bench(partial(run, backend), warmup=5, rep=20, return_mode="median")
            tile = tile or ("", "PyTorch")
            row = dict(operator=operator.__name__, shape="x".join(map(str, shape)), block_n=tile[0], warps=tile[1])
            rows.append(row | {"us": round(us, 1), "TB/s": round(moved / us / 1e6, 2)} | about)
            print(*list(rows[-1].values())[:6], flush=True)
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)
        set_tile(module, *defaults)


if __name__ == "__main__":
    main()

"""Local attention against natten, FlexAttention and dense attention, in one run on one machine.

    python benchmarks/local_attention.py                          # every row, about 15 minutes on an H100
    python benchmarks/local_attention.py --quick                  # within 4 minutes: fewer repeats, no FlexAttention
    python benchmarks/local_attention.py --rows disk-4096 nat     # some rows
    python benchmarks/local_attention.py --quick --seconds 60     # no row is begun after so long
    python benchmarks/local_attention.py --tune                   # tile sizes of every kernel, not the peers

Times are medians of GPU time between events (milliseconds). TFLOP/s: "useful" counts pairs that the pattern shows,
"executed" pairs in visited tiles, 4 * D FLOP each (10 * D backward). natten takes part where it can be imported.
Writes benchmarks/results/local_attention-<gpu>-torch<version>.csv row by row (or --out).
"""

import argparse
import csv
import gc
import itertools
import math
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import visionattn
from visionattn.ops.local import Disk, Neighborhood, counts, fused, gluon, local_attention
from visionattn.ops.local.tiles import Tile

try:
    import natten
except ImportError:
    natten = None

HEADS, DIM, TEXT = 24, 128, 512
START = time.perf_counter()


def time_of(run, seconds: float = 0.3, most: int = 50) -> float:
    """Median milliseconds of a call. Short calls are timed several in a row, as a loop over layers would run them."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 1e-5)
    inner = max(1, min(20, int(2e-3 / once)))
    outer = max(3, min(most, int(seconds / (once * inner))))
    times = []
    for _ in range(outer if once < 0.5 else 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return statistics.median(times)


def attempt(run, what: str, **options) -> float | None:
    try:
        return time_of(run, **options)
    except Exception as e:  # a peer that can't run leaves an empty cell, and says why
        print(f"    {what}: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}", flush=True)
        return None


def make(grid, text=TEXT, batch=1, heads=HEADS, dim=DIM, grad=False):
    torch.manual_seed(0)
    n = math.prod(grid) + text
    return [
        torch.randn(batch, n, heads, dim, device="cuda", dtype=torch.bfloat16).requires_grad_(grad) for _ in range(3)
    ]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def plan_of(q, k, v, grid, pattern, text, tiles=None):
    return fused.plan(q, k, v, None, None, None, None, grid, pattern, text, True, q.shape[-1] ** -0.5, tiles)


def outputs(q):
    return torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device="cuda")


def image_run(q, k, v, grid, pattern, text, tiles=None):
    """A call of the grid's queries alone."""
    plan = plan_of(q, k, v, grid, pattern, text, tiles)
    out, lse = outputs(q)
    return lambda: fused.grid_forward(plan, q, k, v, None, None, None, None, out, lse)


def text_run(q, k, v, grid, text, tiles=None):
    plan = plan_of(q, k, v, grid, Disk(1), text, tiles)
    out, lse = outputs(q)
    return lambda: fused.text_forward(plan, q, k, v, None, out, lse)


def dense_run(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def dense_backward_run(q, k, v, grad):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    grad = grad.transpose(1, 2)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def natten_run(q, k, v, grid, window, stride, text, **options):
    """natten's image queries; every configuration of its Hopper kernel, the best is what counts."""
    if natten is None:
        return None
    split = [x[:, :text].contiguous() for x in (k, v)]
    shaped = [x[:, text:].reshape(x.shape[0], *grid, *x.shape[2:]).contiguous() for x in (q, k, v)]
    run = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1]
    if text:
        options |= dict(additional_keys=split[0], additional_values=split[1])
    return lambda: run(*shaped, kernel_size=window, stride=stride, **options)


def natten_best(q, k, v, grid, window, stride, text) -> float | None:
    if natten is None:
        return None
    best = None
    shapes = [(16, 8)] if len(grid) == 2 else [(4, 4, 8), (2, 8, 8)]
    for shape, schedule in itertools.product(shapes, ("coop", "pp")):
        names = {"coop": "KernelSchedule.WarpSpecializedCooperative", "pp": "KernelSchedule.WarpSpecializedPingpong"}
        for kernel_schedule in (schedule, names[schedule]):
            options = dict(
                backend="hopper-fna", q_tile_shape=shape, kv_tile_shape=shape, kernel_schedule=kernel_schedule
            )
            try:
                natten_run(q, k, v, grid, window, stride, text, **options)()
            except Exception:
                continue
            ms = attempt(natten_run(q, k, v, grid, window, stride, text, **options), "natten")
            best = ms if best is None or (ms is not None and ms < best) else best
            break
    if best is None:
        best = attempt(natten_run(q, k, v, grid, window, stride, text), "natten")
    return best


def flex_run(q, k, v, grid, radius, tile=None):
    """FlexAttention of CLEAR's layer, in raster order or with the tokens in the order of tiles (reordered before)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    W, text, N = grid[1], TEXT, q.shape[1]

    def place(i):
        if tile is None:
            return i // W, i % W
        th, tw = tile
        t, inside = i // (th * tw), i % (th * tw)
        return t // (W // tw) * th + inside // tw, t % (W // tw) * tw + inside % tw

    def mask(b, h, i, j):
        qy, qx = place(i - text)
        ky, kx = place(j - text)
        near = (qy - ky) * (qy - ky) + (qx - kx) * (qx - kx) < radius * radius
        return (i < text) | (j < text) | near

    block_mask = create_block_mask(mask, None, None, N, N, device="cuda", BLOCK_SIZE=128, _compile=True)
    attend = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attend(q, k, v, block_mask=block_mask)


def flex_time(q, k, v, grid, radius, tile) -> float | None:
    try:
        run = flex_run(q, k, v, grid, radius, tile)
    except Exception as e:
        print(f"    flex's mask: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}", flush=True)
        return None
    return attempt(run, "flex")


class Report:
    """The table: one line of the file for every measurement, written at once."""

    COLUMNS = ["row", "what", "implementation", "ms", "useful_tflops", "executed_tflops", "note"]

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.environment = [
            torch.cuda.get_device_name(), torch.__version__, triton.__version__,
            getattr(natten, "__version__", "") if natten else "", visionattn.__version__,
        ]  # fmt: skip
        self.writer.writerow([*self.COLUMNS, "gpu", "torch", "triton", "natten", "visionattn"])

    def __call__(self, row, what, implementation, ms, useful=None, executed=None, note="") -> float | None:
        """`useful`, `executed`: FLOP."""
        if ms is None:
            return None
        rates = ["" if f is None else f"{f / ms / 1e9:.1f}" for f in (useful, executed)]
        self.writer.writerow([row, what, implementation, f"{ms:.4f}", *rates, note, *self.environment])
        self.file.flush()
        shown = f"{rates[0] or '-':>7} useful {rates[1] or '-':>7} executed TFLOP/s"
        clock = f"  [{time.perf_counter() - START:5.0f} s]"
        print(f"{clock} {row:16}{what:34}{implementation:14}{ms:10.4f} ms {shown} {note}", flush=True)
        return ms


def flops(grid, pattern, text, tile: Tile, heads=HEADS, dim=DIM, batch=1) -> dict[str, float]:
    return counted(grid, pattern, text, tile.query, tile.key, heads, dim, batch)


def counted(grid, pattern, text, query, key, heads=HEADS, dim=DIM, batch=1) -> dict[str, float]:
    """FLOP by tiles of queries and keys."""
    found = counts.count(pattern, grid, text, 0, query, key)
    each = 4 * dim * heads * batch
    return {
        "useful image": (found["pairs"] - found["text_rows"]) * each,
        "executed image": (found["executed"] - found["text_rows"]) * each,
        "useful": found["pairs"] * each,
        "executed": found["executed"] * each,
        "text": found["text_rows"] * each,
        "dense": found["dense"] * each,
    }


def check(q, k, v, grid, pattern, text) -> None:
    """Rows in the middle and at the corners against the definition, before anything is timed."""
    out = local_attention(q, k, v, grid, pattern, text, backend="triton")
    n = math.prod(grid)
    for token in {0, n - 1, n // 2 + grid[-1] // 2}:
        seen = torch.cat(
            [torch.ones(text, dtype=torch.bool, device="cuda"), pattern.mask(grid, token, token + 1, "cuda")[0]]
        )
        logits = torch.einsum("bhd,bnhd->bhn", q[:, text + token].double(), k[:, seen].double()) * q.shape[-1] ** -0.5
        expected = torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v[:, seen].double())
        error = ((out[:, text + token].double() - expected).norm() / expected.norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"{pattern} on {grid}: token {token} is off by {error:.3g}, so nothing is timed")


def image_rows(report, name, q, k, v, grid, pattern, text) -> tuple[float | None, dict]:
    """The kernel that 'auto' takes, and the other one where both can run: its milliseconds, and FLOP."""
    auto = plan_of(q, k, v, grid, pattern, text)
    found = None
    for choice in ("auto", "triton" if auto.gluon else "gluon"):
        fused.forward_choice = choice
        try:
            plan = plan_of(q, k, v, grid, pattern, text)
            if choice == "gluon" and plan.gluon is None:
                continue
            tile = plan.gluon or plan.tiles.forward
            f = counted(grid, pattern, text, tile.query, tile.key)
            kernel = "gluon" if plan.gluon else "triton"
            ms = attempt(image_run(q, k, v, grid, pattern, text), f"ours, {kernel}")
            kernel = "gluon" if plan.gluon and not gluon.failed else "triton"
            report(
                name, "image queries", "ours" if choice == "auto" else f"ours, {choice}", ms, f["useful image"],
                f["executed image"], f"{kernel}: queries {tile.query} keys {tile.key}".replace(",", ""),
            )  # fmt: skip
            if choice == "auto":
                found = ms, f
        finally:
            fused.forward_choice = "auto"
    return found


def forward_row(report, name, grid, pattern, text, dense=True, peer=None, flex=False, whole=True) -> None:
    q, k, v = make(grid, text)
    check(q, k, v, grid, pattern, text)
    ours, f = image_rows(report, name, q, k, v, grid, pattern, text)
    layer = None
    if text and whole:
        layer = report(name, "whole layer", "ours", attempt(
            partial(local_attention, q, k, v, grid, pattern, text), "ours"), f["useful"], f["executed"])  # fmt: skip
    if dense:
        full = report(name, "dense, no pattern", "cudnn", attempt(dense_run(q, k, v), "cudnn"), f["dense"], f["dense"])
        if full and ours:
            rate = f["dense"] / full
            useful, executed = (f[f"{kind} image"] / ours / rate for kind in ("useful", "executed"))
            print(
                f"    of dense: useful {useful:.3f}, executed {executed:.3f}; {full / (layer or ours):.2f}x", flush=True
            )
    if peer:
        window, stride = peer
        ms = report(name, f"image queries, window {window} stride {stride}", "natten",
                    natten_best(q, k, v, grid, window, stride, text))  # fmt: skip
        if ms and ours:
            print(f"    natten / ours: {ms / ours:.2f}", flush=True)
    if flex:
        for tile, what in ((None, "raster"), ((8, 16), "tile order")):
            ms = report(name, f"whole layer, {what}", "flex",
                        flex_time(q, k, v, grid, pattern.radius, tile))  # fmt: skip
            if ms and layer:
                print(f"    flex / ours: {ms / layer:.2f}", flush=True)
            torch._dynamo.reset()
    free()


def text_row(report, sides) -> None:
    for side in sides:
        grid = (side, side)
        q, k, v = make(grid)
        f = flops(grid, Disk(1), TEXT, plan_of(q, k, v, grid, Disk(1), TEXT).tiles.forward)
        report("text", f"text rows, {16 * side} px", "ours", attempt(text_run(q, k, v, grid, TEXT), "ours"), f["text"],
               f["text"])  # fmt: skip
        report("text", f"text rows, {16 * side} px", "cudnn", attempt(dense_run(q[:, :TEXT], k, v), "cudnn"), f["text"],
               f["text"])  # fmt: skip
        if side <= 256:
            report(
                "text", f"dense, {16 * side} px", "cudnn", attempt(dense_run(q, k, v), "cudnn"), f["dense"], f["dense"]
            )
        del q, k, v
        free()


def backward_case(report, name, pattern, text, peer) -> None:
    grid = (128, 128)
    q, k, v = make(grid, text, grad=True)
    grad = torch.randn_like(q)
    tiles = plan_of(q, k, v, grid, pattern, text).tiles
    out = local_attention(q, k, v, grid, pattern, text, backend="triton")
    by_query = flops(grid, pattern, text, tiles.query)
    by_key = flops(grid, pattern, text, Tile(tiles.backward_keys.key, tiles.backward_keys.query, 1, 1))
    # of a pair's five products, dense attention's backward pass, our two kernels execute three and four
    executed = (by_query["executed"] * 3 + by_key["executed"] * 4) / 7 * 2.5
    run = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
    what = "backward, whole layer"
    note = "executed at 5 products a pair"
    ours = report(name, what, "ours", attempt(run, "ours"), by_query["useful"] * 2.5, executed, note)
    full = by_query["dense"] * 2.5
    dense = report(name, "backward, dense", "cudnn", attempt(dense_backward_run(q, k, v, grad), "cudnn"), full, full)
    if ours and dense:
        print(f"    executed over dense: {executed / ours / (full / dense):.3f}", flush=True)
    if natten is None:
        return
    image = [x.detach()[:, text:].contiguous().requires_grad_() for x in (q, k, v)]
    try:
        result = natten_run(*image, grid, *peer, 0, backend="hopper-fna")()
        run = partial(torch.autograd.grad, result, image, torch.randn_like(result), retain_graph=True)
        what = f"backward, image only, window {peer[0]} stride {peer[1]}"
        report(name, what, "natten", attempt(run, "natten"))
    except Exception as e:
        print(f"    natten: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}")


def backward_row(report) -> None:
    backward_case(report, "backward disk", Disk(16), TEXT, ((28, 28), (1, 1)))
    free()
    backward_case(report, "backward w80 s16", Neighborhood(80, 16), 0, ((80, 80), (16, 16)))


def nat_row(report, flex: bool) -> None:
    for side, heads in ((56, 2), (28, 4), (14, 8)):
        nat_case(report, (side, side), heads, flex)
        free()


def nat_case(report, grid, heads, flex: bool) -> None:
    pattern = Neighborhood(7)
    q, k, v = make(grid, 0, 64, heads, 32, grad=True)
    bias = torch.randn(heads, 13, 13, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(q)
    runs = {
        "ours, biased": (partial(local_attention, q, k, v, grid, pattern, bias=bias), (q, k, v, bias)),
        "ours": (partial(local_attention, q, k, v, grid, pattern), (q, k, v)),
    }
    if natten is not None:
        image = [x.detach().reshape(64, *grid, heads, 32).requires_grad_() for x in (q, k, v)]
        runs["natten"] = lambda: natten.na2d(*image, kernel_size=7).flatten(1, 2), image
    if flex:
        run = partial(local_attention, q, k, v, grid, pattern, bias=bias, backend="flex")
        runs["flex, biased"] = run, (q, k, v, bias)
    for name, (run, leaves) in runs.items():

        def both(run=run, leaves=leaves):
            torch.autograd.grad(run(), leaves, grad)

        what = f"{grid[0]} x {grid[1]} x {heads} heads"
        with torch.no_grad():
            report("nat", f"{what}, forward", name, attempt(run, name))
        report("nat", f"{what}, forward and backward", name, attempt(both, name))


VIDEO = (18, 24, 24), (2, 8, 8)
# grid, pattern, text, and natten's window and stride beside it
FORWARD = {
    "disk-4096": ((256, 256), Disk(16), TEXT, ((28, 28), (1, 1))),
    "disk-8192": ((512, 512), Disk(16), TEXT, ((28, 28), (1, 1))),
    "w80-s16": ((256, 256), Neighborhood(80, 16), 0, ((80, 80), (16, 16))),
    "w80-s16-text": ((256, 256), Neighborhood(80, 16), TEXT, ((80, 80), (16, 16))),
    "w48-s1": ((256, 256), Neighborhood(48), 0, ((48, 48), (1, 1))),
    "w80-s1": ((256, 256), Neighborhood(80), 0, ((80, 80), (1, 1))),
    "video": ((30, 48, 80), Neighborhood(*VIDEO), 0, VIDEO),
    "hunyuan": ((33, 45, 80), Neighborhood(*VIDEO), 0, VIDEO),
    "disk-1024": ((64, 64), Disk(16), TEXT, None),
    "w32-1024": ((64, 64), Neighborhood(32, 16), TEXT, None),
}
ROWS = (*FORWARD, "text", "backward", "nat")


def run_row(name: str, report, quick: bool) -> None:
    if name in FORWARD:
        grid, pattern, text, peer = FORWARD[name]
        slow = quick and name in ("disk-8192", "hunyuan")
        dense = name not in ("w48-s1", "w80-s1") and not slow
        forward_row(report, name, grid, pattern, text, dense, peer, flex=name == "disk-4096" and not quick)
    elif name == "text":
        text_row(report, (64, 128, 256, 512))
    elif name == "backward":
        backward_row(report)
    else:
        nat_row(report, not quick)


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
    from dataclasses import replace

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
    script = [sys.executable, __file__, "--tune", *(["--kernels", *only] if only else [])]
    shards = [subprocess.Popen([*script, "--shard", str(i), str(workers)]) for i in range(workers)]
    for shard in shards:
        shard.wait()
    print(f"  [{time.perf_counter() - START:5.0f} s] compiled", flush=True)
    for kind, case, candidate in work:
        try:
            run, f = tune_run(kind, case, candidate)
        except Exception as e:
            print(f"    {kind} {case} {candidate}: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}")
            continue
        ms = attempt(run, f"{kind} {case} {candidate}", seconds=0.1)
        report(f"tune {kind}", case, str(candidate).replace(",", ""), ms, None, f)
        del run


def warm(index: int, workers: int, only) -> None:
    """Compiles every n-th candidate, for Triton's cache."""
    work = [(kind, case, c) for (kind, case), list_ in CANDIDATES.items() for c in list_ if not only or kind in only]
    for item in work[index::workers]:
        try:
            tune_run(*item)[0]()
            torch.cuda.synchronize()
        except Exception as e:
            print(f"    {item}: {type(e).__name__}: {str(e).strip().splitlines()[0][:120]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--quick", action="store_true", help="within 4 minutes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so long")
    parser.add_argument("--tune", action="store_true", help="time tile sizes instead")
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
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    version = torch.__version__.split("+")[0]
    name = f"local_attention{'-tune' if args.tune else ''}-{gpu}-torch{version}.csv"
    report = Report(args.out or Path(__file__).parent / "results" / name)
    if args.tune:
        tune(report, args.kernels, args.workers)
        return
    for row in args.rows:
        if time.perf_counter() - START > args.seconds:
            print(f"{row}: not begun after {args.seconds:.0f} s", flush=True)
            continue
        print(row, flush=True)
        try:
            run_row(row, report, args.quick)
        except Exception as e:  # the other rows are still worth having
            print(f"    {row} failed: {type(e).__name__}: {str(e).strip().splitlines()[0][:300]}", flush=True)
        free()


if __name__ == "__main__":
    main()

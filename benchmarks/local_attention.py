"""Local attention against natten, FlexAttention and dense attention: one table, in one run on one machine.

    python benchmarks/local_attention.py --seconds 300            # every row: about 4 minutes on an H100
    python benchmarks/local_attention.py --rows disk-4096 nat     # some rows
    python benchmarks/local_attention.py --rows disk-4096 --no-flex
    python benchmarks/local_attention.py --dry                    # on a CPU, tiny: whether every row runs

FlexAttention's kernels are compiled first, in processes of their own. Times are medians of GPU time between events
(milliseconds). TFLOP/s: "useful" counts pairs that the pattern shows, "executed" pairs in visited tiles, 4 * D FLOP
each (10 * D backward). natten takes part where it can be imported. Nothing is begun after --seconds.
Writes benchmarks/results/local_attention-<gpu>-torch<version>.csv line by line (or --out); what is there from the same
GPU, versions and code is not measured again without --fresh. The end shows the table of goals.
"""

import argparse
import csv
import hashlib
import math
import os
import re
import sys
import time
from functools import cached_property, partial
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from local_peers import (
    DEVICE,
    DRY,
    DTYPE,
    Warmers,
    dense_backward_run,
    dense_run,
    first_line,
    flex_run,
    free,
    natten,
    natten_best,
    natten_run,
    synchronize,
    time_of,
)  # fmt: skip

import visionattn
from visionattn.ops.local import Cross, Disk, Neighborhood, counts, fused, gluon, local_attention, worthwhile
from visionattn.ops.local import text as text_rows
from visionattn.ops.local.tiles import Tile

HEADS, DIM, TEXT = (2, 16, 6) if DRY else (24, 128, 512)
START = time.perf_counter()


def clock() -> float:
    return time.perf_counter() - START


def result_path(name: str) -> Path:
    gpu = "cpu" if DRY else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path(__file__).parent / "results" / f"{name}-{gpu}-torch{torch.__version__.split('+')[0]}.csv"


def make(grid, text=TEXT, batch=1, heads=HEADS, dim=DIM, grad=False):
    torch.manual_seed(0)
    n = math.prod(grid) + text
    return [torch.randn(batch, n, heads, dim, device=DEVICE, dtype=DTYPE).requires_grad_(grad) for _ in range(3)]


def plan_of(q, k, v, grid, pattern, text, tiles=None):
    return fused.plan(q, k, v, None, None, None, None, grid, pattern, text, True, q.shape[-1] ** -0.5, tiles)


def outputs(q):
    return torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device=DEVICE)


def image_run(q, k, v, grid, pattern, text, choice="auto"):
    """A call of the grid's queries alone. `choice`: the kernel, as fused.forward_choice."""
    plan = _with_choice(fused, "forward_choice", choice, lambda: plan_of(q, k, v, grid, pattern, text))
    out, lse = outputs(q)

    def run():
        if choice == "auto":
            return fused.grid_forward(plan, q, k, v, None, None, None, None, out, lse)
        call = partial(fused.grid_forward, plan, q, k, v, None, None, None, None, out, lse)
        return _with_choice(fused, "forward_choice", choice, call)

    return run


def text_run(q, k, v, grid, text, choice="auto", chunks=None):
    """A call of the text's queries alone; `chunks`: into how many the keys are cut for cuDNN."""
    plan = _with_choice(text_rows, "choice", choice, lambda: plan_of(q, k, v, grid, Disk(1), text))
    if chunks is not None:
        plan = fused.Plan(q, k, v, None, None, None, None, grid, Disk(1), text, True, q.shape[-1] ** -0.5, None)
        plan.text_chunks = text_rows.cut(plan.N, chunks)
    out, lse = outputs(q)
    call = partial(fused.text_forward, plan, q, k, v, None, out, lse)
    return call if choice == "auto" else lambda: _with_choice(text_rows, "choice", choice, call)


def _with_choice(module, name: str, choice: str, run):
    before = getattr(module, name)
    setattr(module, name, choice)
    try:
        return run()
    finally:
        setattr(module, name, before)


def code_hash() -> str:
    """Of the operator's files: lines of other code are not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(Path(fused.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


class Report:
    """The table: one line of the file for every measurement, written at once."""

    COLUMNS = ["row", "what", "implementation", "ms", "useful_tflops", "executed_tflops", "note"]
    ENVIRONMENT = ["gpu", "torch", "triton", "natten", "visionattn", "code"]

    def __init__(self, path: Path, fresh: bool = False, seconds: float = math.inf):
        self.seconds, self.left_out = seconds, 0
        self.environment = [
            "CPU" if DRY else torch.cuda.get_device_name(), torch.__version__, triton.__version__,
            getattr(natten, "__version__", "") if natten else "", visionattn.__version__, code_hash(),
        ]  # fmt: skip
        self.known: dict[tuple[str, str, str], dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not fresh:
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    if [line.get(name) for name in self.ENVIRONMENT] == self.environment:
                        self.known[line["row"], line["what"], line["implementation"]] = line
        part = path.with_suffix(".part")
        self.file = part.open("w", newline="")
        self.writer = csv.DictWriter(self.file, [*self.COLUMNS, *self.ENVIRONMENT])
        self.writer.writeheader()
        self.writer.writerows(self.known.values())
        self.file.flush()
        part.replace(path)

    def measure(self, row, what, implementation, prepare, useful=None, executed=None, note="", **options):
        """Milliseconds of the call that `prepare()` returns, or None. `useful`, `executed`: FLOP."""
        key = (row, what, implementation)
        if key in self.known:
            return float(self.known[key]["ms"])
        if clock() > self.seconds:
            self.left_out += 1
            return None
        try:
            run = prepare()
            ms = time_of(run, **options)
            del run
        except Exception as e:  # a peer that can't run leaves no line, and says why
            print(f"    {row}, {what}, {implementation}: {first_line(e)}", flush=True)
            return None
        return self.write(row, what, implementation, ms, useful, executed, note)

    def write(self, row, what, implementation, ms, useful=None, executed=None, note="") -> float:
        rates = ["" if f is None else f"{f / ms / 1e9:.1f}" for f in (useful, executed)]
        values = [row, what, implementation, f"{ms:.4f}", *rates, str(note).replace(",", ""), *self.environment]
        line = dict(zip([*self.COLUMNS, *self.ENVIRONMENT], values, strict=True))
        self.known[row, what, implementation] = line
        self.writer.writerow(line)
        self.file.flush()
        shown = f"{rates[0] or '-':>7} useful {rates[1] or '-':>7} executed TFLOP/s"
        print(f"  [{clock():5.0f} s] {row:16}{what:40}{implementation:18}{ms:10.4f} ms {shown} {note}", flush=True)
        return ms

    def get(self, row, what, implementation, column="ms") -> float | None:
        value = self.known.get((row, what, implementation), {}).get(column)
        return float(value) if value else None


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
    """Rows in the middle and at the corners, and of text, against the definition, before anything is timed."""
    out = local_attention(q, k, v, grid, pattern, text, backend="triton")
    n = math.prod(grid)
    for token in {-text, -1, 0, n - 1, n // 2 + grid[-1] // 2} - ({-1} if not text else set()):
        seen = torch.ones(text + n, dtype=torch.bool, device=DEVICE)
        if token >= 0:
            seen[text:] = pattern.mask(grid, token, token + 1, DEVICE)[0]
        logits = torch.einsum("bhd,bnhd->bhn", q[:, text + token].double(), k[:, seen].double()) * q.shape[-1] ** -0.5
        expected = torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v[:, seen].double())
        error = ((out[:, text + token].double() - expected).norm() / expected.norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"{pattern} on {grid}: token {token} is off by {error:.3g}, so nothing is timed")


def ready(run):
    """For what needs no preparation."""
    return run


class Case:
    """A grid and a pattern with its tensors, made when something is measured on them."""

    def __init__(self, grid, pattern, text=TEXT):
        self.settings = (grid, pattern, text)
        self.grid, self.pattern, self.text = grid, pattern, text

    @cached_property
    def tensors(self):
        q, k, v = make(self.grid, self.text)
        check(q, k, v, *self.settings)
        return q, k, v

    def plan(self, choice="auto"):
        return _with_choice(fused, "forward_choice", choice, lambda: plan_of(*self.tensors, *self.settings))


def work_of(plan, case: Case) -> tuple[dict[str, float], str]:
    """FLOP of a case as its plan runs it, and the tiles in words."""
    tile = plan.gluon or plan.tiles.forward
    if hasattr(tile, "query"):
        return counted(*case.settings, tile.query, tile.key), f"queries {tile.query} keys {tile.key}"
    # the disk's kernel: pairs of 8 x 8 queries that share loads, each computes the squares of keys that it needs
    return counted(*case.settings, (1, 8, 8), (1, 8, 8)), str(tile)


def image_rows(report, name, case: Case) -> None:
    """The kernel that 'auto' takes, and Triton's and Gluon's where they are not that one."""
    auto = case.plan()
    for choice in ("auto", "triton" if auto.gluon else "gluon"):
        plan = case.plan(choice)
        if choice == "gluon" and plan.gluon is None:
            continue
        f, words = work_of(plan, case)
        kernel = "gluon" if plan.gluon and not gluon.failed else "triton"
        report.measure(
            name, "image queries", "ours" if choice == "auto" else f"ours, {choice}",
            partial(image_run, *case.tensors, *case.settings, choice), f["useful image"], f["executed image"],
            f"{kernel}: {words}",
        )  # fmt: skip


def forward_row(report, name, case: Case, peer=None, dense=True) -> None:
    image_rows(report, name, case)
    f, _ = work_of(case.plan(), case)
    if case.text:
        note = "; ".join(case.plan().kernels())
        run = partial(local_attention, *case.tensors, *case.settings, backend="triton")
        report.measure(name, "whole layer", "ours", partial(ready, run), f["useful"], f["executed"], note)
    if peer and natten is not None:
        window, stride = peer
        what = f"image queries, window {window} stride {stride}"
        best = partial(natten_best, *case.tensors, case.grid, window, stride, case.text)
        report.measure(name, what, "natten", best)
    if dense:
        report.measure(name, "dense, no pattern", "cudnn", partial(dense_run, *case.tensors), f["dense"], f["dense"])


def flex_row(report, name, case: Case) -> None:
    """CLEAR's layer by FlexAttention."""
    for tile, what in ((None, "raster"), ((2, 4) if DRY else (8, 16), "tile order")):
        report.measure(
            name, f"whole layer, {what}", "flex",
            partial(flex_run, *case.tensors, case.grid, case.pattern.radius, case.text, tile),
        )  # fmt: skip


def text_case(report, side: int) -> None:
    grid, what = (side, side), f"text rows, {16 * side} px"
    q, k, v = make(grid)
    f = 4 * DIM * HEADS * TEXT * q.shape[1]
    note = str(plan_of(q, k, v, grid, Disk(1), TEXT).text_chunks or "Triton")
    run = partial(text_run, q, k, v, grid, TEXT)
    report.measure("text", what, "ours", run, f, f, note)
    report.measure("text", what, "ours, triton", partial(run, "triton"), f, f)
    report.measure("text", what, "cudnn", partial(dense_run, q[:, :TEXT], k, v), f, f)
    for chunks in (2, 3) if DRY else (1, 2, 3, 4, 5, 6, 8, 11, 16):
        report.measure("text", what, f"ours, cudnn in {chunks}", partial(run, "cudnn", chunks), f, f, seconds=0.1)
    if side not in (256, 512):  # their dense rows are those of the disk
        n = 4 * DIM * HEADS * q.shape[1] ** 2
        report.measure("text", f"dense, {16 * side} px", "cudnn", partial(dense_run, q, k, v), n, n)


def text_row(report) -> None:
    """Text queries, at 1024 to 8192 px: what 'auto' takes, Triton's kernel, cuDNN on the same rows in chunks."""
    for side in (8, 12) if DRY else (256, 64, 128, 512):
        text_case(report, side)
        free()


def short_text_case(report, side: int, text: int, dim: int) -> None:
    grid, what = (side, side), f"{text} text rows, heads of {dim}, {16 * side} px"
    q, k, v = make(grid, text, dim=dim)
    f = 4 * dim * HEADS * text * q.shape[1]
    run = partial(text_run, q, k, v, grid, text)
    report.measure("short text", what, "ours, triton", partial(run, "triton"), f, f, seconds=0.1)
    picked = plan_with_cudnn(q, k, v, grid, text)
    for chunks in sorted({1, picked.count}) if picked else ():
        name = "ours, cudnn" + ("" if chunks == 1 else " in chunks")
        report.measure("short text", what, name, partial(run, "cudnn", chunks), f, f, f"{chunks}", seconds=0.1)


def short_text_row(report) -> None:
    """Where cuDNN begins to pay: text lengths below 512, and heads of 64."""
    for side in (8,) if DRY else (64, 128, 256):
        for text, dim in ((3, DIM), (5, DIM)) if DRY else ((77, 128), (128, 128), (256, 128), (512, 64)):
            short_text_case(report, side, text, dim)
        free()


def plan_with_cudnn(q, k, v, grid, text):
    return _with_choice(text_rows, "choice", "cudnn", lambda: plan_of(q, k, v, grid, Disk(1), text)).text_chunks


SMALL = {
    "disk 8": Disk(8), "disk 16": Disk(16), "disk 32": Disk(32), "window 16 stride 16": Neighborhood(16, 16),
    "window 32 stride 16": Neighborhood(32, 16), "window 48 stride 16": Neighborhood(48, 16),
    "window 16": Neighborhood(16), "window 32": Neighborhood(32), "cross 8": Cross(8, 8),
}  # fmt: skip


def small_case(report, text: int) -> None:
    grid = (12, 12) if DRY else (64, 64)
    q, k, v = make(grid, text)
    n = 4 * DIM * HEADS * q.shape[1] ** 2
    report.measure("small", f"dense, {text} text", "cudnn", partial(dense_run, q, k, v), n, n)
    for name, pattern in list(SMALL.items())[: 2 if DRY else None]:
        pattern = Disk(4) if DRY else pattern
        run = partial(local_attention, q, k, v, grid, pattern, text, backend="triton")
        say = "sparse" if worthwhile(grid, pattern, text, HEADS, DIM, DTYPE, DEVICE) else "dense"
        report.measure("small", f"{name}, {text} text", "ours", partial(ready, run), note=f"planner: {say}")


def small_row(report) -> None:
    """1024 px, where dense attention is hard to beat: every pattern, and what the planner says of it."""
    for text in (TEXT, 0) if DRY else (TEXT, 77, 0):
        small_case(report, text)
        free()


def setup_case(report, grid) -> None:
    q, k, v = make(grid)
    synchronize()  # else the table's copy to the GPU waits for the random inputs
    begin = time.perf_counter()
    plan = fused.Plan(q, k, v, None, None, None, None, grid, Disk(16), TEXT, True, DIM**-0.5, None)
    plan.table(plan.tiles.forward.query, plan.tiles.forward.key)
    report.write("set-up", f"plan and tables, {grid}", "ours", 1e3 * (time.perf_counter() - begin))
    for what in ("first call", "second call"):
        synchronize()
        begin = time.perf_counter()
        local_attention(q, k, v, grid, Disk(16), TEXT, backend="triton")
        synchronize()
        report.write("set-up", f"{what}, {grid}", "ours", 1e3 * (time.perf_counter() - begin))


def setup_row(report) -> None:
    """A grid that was not seen before, at 8192 px: host time until the first call's kernels are done."""
    for grid in [(10, 12)] if DRY else [(500, 512), (508, 512)]:
        if ("set-up", f"second call, {grid}", "ours") not in report.known and clock() < report.seconds:
            setup_case(report, grid)
            free()


def backward_case(report, name, pattern, text, peer) -> None:
    grid = (8, 8) if DRY else (128, 128)
    q, k, v = make(grid, text, grad=True)
    grad = torch.randn_like(q)
    tiles = plan_of(q, k, v, grid, pattern, text).tiles
    by_query = flops(grid, pattern, text, tiles.query)
    by_key = flops(grid, pattern, text, Tile(tiles.backward_keys.key, tiles.backward_keys.query, 1, 1))
    # of a pair's five products, dense attention's backward pass, our two kernels execute three and four
    executed = (by_query["executed"] * 3 + by_key["executed"] * 4) / 7 * 2.5

    def ours():
        out = local_attention(q, k, v, grid, pattern, text, backend="triton")
        return partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)

    note = "executed at 5 products a pair"
    report.measure(name, "backward, whole layer", "ours", ours, by_query["useful"] * 2.5, executed, note)
    full = by_query["dense"] * 2.5
    report.measure(name, "backward, dense", "cudnn", lambda: dense_backward_run(q, k, v, grad), full, full)
    if natten is None:
        return

    def other():
        image = [x.detach()[:, text:].contiguous().requires_grad_() for x in (q, k, v)]
        result = natten_run(*image, grid, *peer, 0, **({} if DRY else dict(backend="hopper-fna")))()
        return partial(torch.autograd.grad, result, image, torch.randn_like(result), retain_graph=True)

    report.measure(name, f"backward, image only, window {peer[0]} stride {peer[1]}", "natten", other)


def backward_row(report) -> None:
    windows = [((3, 3), (1, 1)), ((4, 4), (2, 2))] if DRY else [((28, 28), (1, 1)), ((80, 80), (16, 16))]
    backward_case(report, "backward disk", Disk(2 if DRY else 16), TEXT, windows[0])
    free()
    backward_case(report, "backward w80 s16", Neighborhood(*windows[1]), 0, windows[1])
    free()


NAT = ((56, 2), (28, 4), (14, 8))


def nat_name(side: int, heads: int) -> str:
    return f"{side} x {side} x {heads} heads"


def nat_runs(side, heads, flex: bool) -> dict:
    """What is timed of a layer of NAT-Tiny: a call and its leaves by name, and the outputs' gradient."""
    grid, pattern, batch, dim = (side, side), Neighborhood(7), 1 if DRY else 64, 32
    q, k, v = make(grid, 0, batch, heads, dim, grad=True)
    bias = torch.randn(heads, 13, 13, device=DEVICE, dtype=DTYPE).requires_grad_()
    kernels = dict(backend="triton") if DRY else {}
    runs = {
        "ours, biased": (partial(local_attention, q, k, v, grid, pattern, bias=bias, **kernels), (q, k, v, bias)),
        "ours": (partial(local_attention, q, k, v, grid, pattern, **kernels), (q, k, v)),
    }
    if natten is not None:
        image = [x.detach().reshape(batch, *grid, heads, dim).requires_grad_() for x in (q, k, v)]
        runs["natten"] = lambda: natten.na2d(*image, kernel_size=7).flatten(1, 2), image
    if flex:
        run = partial(local_attention, q, k, v, grid, pattern, bias=bias, backend="flex")
        runs["flex, biased"] = run, (q, k, v, bias)
    return runs, torch.randn_like(q)


def without_gradient(run) -> None:
    with torch.no_grad():
        run()


def with_gradient(run, leaves, grad) -> None:
    torch.autograd.grad(run(), leaves, grad)


def nat_row(report, flex: bool) -> None:
    for side, heads in ((7, 1),) if DRY else NAT:
        runs, grad = nat_runs(side, heads, flex)
        for name, (run, leaves) in runs.items():
            what, both = nat_name(side, heads), partial(with_gradient, run, leaves, grad)
            report.measure("nat", f"{what}, forward", name, partial(ready, partial(without_gradient, run)))
            report.measure("nat", f"{what}, forward and backward", name, partial(ready, both))
        del runs, grad
        free()


VIDEO = (18, 24, 24), (2, 8, 8)
CLEAR_PEER = ((28, 28), (1, 1))
# grid, pattern, text, and natten's window and stride beside it
FORWARD = {
    "disk-4096": ((256, 256), Disk(16), TEXT, CLEAR_PEER),
    "w80-s16": ((256, 256), Neighborhood(80, 16), 0, ((80, 80), (16, 16))),
    "w80-s16-text": ((256, 256), Neighborhood(80, 16), TEXT, ((80, 80), (16, 16))),
    "video": ((30, 48, 80), Neighborhood(*VIDEO), 0, VIDEO),
    "hunyuan": ((33, 45, 80), Neighborhood(*VIDEO), 0, VIDEO),
    "disk-8192": ((512, 512), Disk(16), TEXT, CLEAR_PEER),
    "w48-s1": ((256, 256), Neighborhood(48), 0, ((48, 48), (1, 1))),
    "w80-s1": ((256, 256), Neighborhood(80), 0, ((80, 80), (1, 1))),
    "disk-1024": ((64, 64), Disk(16), TEXT, None),
    "w32-1024": ((64, 64), Neighborhood(32, 16), TEXT, None),
}
if DRY:
    FORWARD = {
        name: (
            (4, 6, 8)[3 - len(g) :],
            Disk(2) if isinstance(p, Disk) else Neighborhood(3),
            text and TEXT,
            peer and ((3, 3, 3)[: len(g)], 1),
        )
        for name, (g, p, text, peer) in FORWARD.items()
    }
# by importance; "dense-8192" and "flex" belong to the disk's rows
ROWS = (
    "disk-4096", "w80-s16", "text", "disk-1024", "w32-1024", "small", "video", "w80-s16-text", "hunyuan", "disk-8192",
    "w48-s1", "w80-s1", "backward", "nat", "flex", "short-text", "set-up", "dense-8192",
)  # fmt: skip


def run_row(name: str, report, flex: bool) -> None:
    if name in FORWARD:
        *settings, peer = FORWARD[name]
        dense = name not in ("w48-s1", "w80-s1", "disk-8192")
        forward_row(report, name, Case(*settings), peer, dense)
    elif name == "flex" and flex:
        flex_row(report, "disk-4096", Case(*FORWARD["disk-4096"][:3]))
    elif name == "dense-8192":
        q, k, v = make(FORWARD["disk-8192"][0])
        n = 4 * DIM * HEADS * q.shape[1] ** 2
        report.measure("disk-8192", "dense, no pattern", "cudnn", lambda: dense_run(q, k, v), n, n)
    elif name == "nat":
        nat_row(report, flex)
    elif name != "flex":
        named = {"text": text_row, "small": small_row, "backward": backward_row, "short-text": short_text_row}
        (named | {"set-up": setup_row})[name](report)


WARM = ("disk raster", "disk tile", *(f"nat {i}" for i in range(len(NAT))))


def warm(name: str) -> None:
    """Compiles a case of FlexAttention, for the caches on disk."""
    kind, _, which = name.partition(" ")
    if kind == "disk":
        grid, pattern, text, _ = FORWARD["disk-4096"]
        tile = None if which == "raster" else (2, 4) if DRY else (8, 16)
        flex_run(*make(grid, text), grid, pattern.radius, text, tile)()
    else:
        side, heads = (7, 1) if DRY else NAT[int(which)]
        runs, grad = nat_runs(side, heads, True)
        run, leaves = runs["flex, biased"]
        with torch.no_grad():
            run()
        torch.autograd.grad(run(), leaves, grad)
    synchronize()


def first_calls(names) -> None:
    """Compiles our own kernels meanwhile."""
    for name in names:
        if name in FORWARD and clock() < 100:
            try:
                assert Case(*FORWARD[name][:3]).tensors
            except Exception as e:  # the row will say it too
                print(f"    {name}: {first_line(e)}", flush=True)
            free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="these, in this order")
    parser.add_argument(
        "--no-flex", "--quick", action="store_true", help="without FlexAttention, which takes a minute to compile"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no measurement after so long")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: whether it runs, no figures")
    parser.add_argument("--warm", choices=WARM, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, or --dry")
    if args.warm:
        warm(args.warm)
        return
    if DRY and not args.out:
        parser.error("--dry needs --out: its times are no results")
    report = Report(args.out or result_path("local_attention"), args.fresh, args.seconds)
    wanted = [] if args.no_flex else [n for n in WARM if ("flex" if n.startswith("disk") else "nat") in args.rows]
    warmers = Warmers(__file__, wanted)
    try:
        if wanted:
            first_calls(args.rows)
            warmers.wait(150 - clock())
            print(f"  [{clock():5.0f} s] compiled", flush=True)
        for row in args.rows:
            try:
                run_row(row, report, not args.no_flex)
            except Exception as e:  # the other rows are still worth having
                print(f"    {row} failed: {first_line(e)}", flush=True)
            free()
    finally:
        warmers.stop()
    if report.left_out:
        print(f"{report.left_out} measurements were not begun after {args.seconds:.0f} s: the same command goes on")
    from local_goals import table

    print(table(report))


if __name__ == "__main__":
    main()

"""What local attention is timed beside: dense attention, natten and FlexAttention; and how calls are timed."""

import gc
import itertools
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import natten
except ImportError:
    natten = None

# everything below runs on a CPU too, tiny and interpreted, to see that it runs (--dry)
DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16
FLEX_BLOCK = 16 if DRY else 128


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def time_of(run, seconds: float = 0.25, most: int = 50) -> float:
    """Median milliseconds of a call. Short calls are timed several in a row, as a loop over layers would run them."""
    run()
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    once = max(time.perf_counter() - begin, 1e-5)
    if DRY:
        return 1e3 * once
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


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"


def free() -> None:
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def cudnn():
    return nullcontext() if DRY else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def dense_run(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run():
        with cudnn():
            return F.scaled_dot_product_attention(q, k, v)

    return run


def dense_backward_run(q, k, v, grad):
    with cudnn():
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    grad = grad.transpose(1, 2)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def natten_run(q, k, v, grid, window, stride, text, **options):
    """natten's image queries, on tensors that are laid out for it before."""
    split = [x[:, :text].contiguous() for x in (k, v)]
    shaped = [x[:, text:].reshape(x.shape[0], *grid, *x.shape[2:]).contiguous() for x in (q, k, v)]
    run = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1]
    if text:
        options |= dict(additional_keys=split[0], additional_values=split[1])
    return lambda: run(*shaped, kernel_size=window, stride=stride, **options)


def natten_best(q, k, v, grid, window, stride, text):
    """The fastest configuration of natten's Hopper kernel; its own choice where none runs."""
    best = None
    shapes = [(16, 8)] if len(grid) == 2 else [(4, 4, 8), (2, 8, 8)]
    names = {"coop": "KernelSchedule.WarpSpecializedCooperative", "pp": "KernelSchedule.WarpSpecializedPingpong"}
    for shape, schedule in itertools.product(shapes, () if DRY else names):
        for kernel_schedule in (schedule, names[schedule]):
            options = dict(
                backend="hopper-fna", q_tile_shape=shape, kv_tile_shape=shape, kernel_schedule=kernel_schedule
            )
            try:
                run = natten_run(q, k, v, grid, window, stride, text, **options)
                ms = time_of(run, seconds=0.1)
            except Exception:  # this version knows the other spelling, or lacks the configuration
                continue
            if best is None or ms < best[0]:
                best = ms, run
            break
    return natten_run(q, k, v, grid, window, stride, text) if best is None else best[1]


def flex_run(q, k, v, grid, radius, text, tile=None):
    """FlexAttention of CLEAR's layer, in raster order or with the tokens in the order of tiles (reordered before)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    W, N = grid[1], q.shape[1]

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

    block_mask = create_block_mask(mask, None, None, N, N, device=DEVICE, BLOCK_SIZE=FLEX_BLOCK, _compile=not DRY)
    attend = flex_attention if DRY else torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attend(q, k, v, block_mask=block_mask)


class Warmers:
    """Processes that compile FlexAttention's kernels for the caches on disk, before anything is timed."""

    def __init__(self, script: str, names: list[str]):
        command = [sys.executable, script, *(["--dry"] if DRY else []), "--warm"]
        self.running = [
            subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in names
        ]

    def wait(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        for process in self.running:
            try:
                process.wait(max(end - time.perf_counter(), 0.1))
            except subprocess.TimeoutExpired:
                break
        self.stop()

    def stop(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()

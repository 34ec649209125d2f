"""Video transformers at 720p (random weights, few layers): windows against dense attention and FlexAttention.

    python benchmarks/video.py                            # about two minutes on an H100
    python benchmarks/video.py --device cpu --tiny --budget 0.1      # that the script runs

HunyuanVideo's shape has 129 frames of 1280 x 720, which are 33 x 45 x 80 tokens, and 256 of text; Wan 2.1 14B's has 81
frames, 21 x 45 x 80 tokens. The networks have their exact widths and a few of their blocks; a step of the whole network
is computed from the medians of its kinds of blocks and the rest, and so is the table (``scaled``). Eager, bfloat16.

Rows: ``dense`` is cuDNN's attention (Hunyuan's mask of the padded text is left out where no text is padded: cuDNN is
faster without it); ``flex`` computes the first window by FlexAttention, compiled, blocks of 128 tokens in raster order,
its block mask made once. ``stub`` is a step without attention over the video. The table is written anew after each row.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from flux import Backend, milliseconds, write_csv

from visionattn import Neighborhood
from visionattn.diffusion import dispatch, sparsify
from visionattn.ops.local import local_attention

COLUMNS = (
    "gpu", "torch", "model", "row", "scaled_ms", "over_dense", "block_ms", "rest_ms", "peak_gib", "calls", "how",
)  # fmt: skip
WINDOWS = {
    "window 18x24x24 stride 2x8x8": Neighborhood((18, 24, 24), (2, 8, 8)),
    "window 30x40x40 stride 1x8x8": Neighborhood((30, 40, 40), (1, 8, 8)),
}
TINY_WINDOWS = {"window 3x4x4 stride 1x2x2": Neighborhood((3, 4, 4), (1, 2, 2))}


def hunyuan(device: str, tiny: bool) -> tuple[torch.nn.Module, dict, tuple[int, int, int], dict[str, int]]:
    """Transformer, call, grid, and how many blocks of each kind the whole network has."""
    grid = (5, 8, 8) if tiny else (33, 45, 80)
    small = dict(num_attention_heads=2, attention_head_dim=32, text_embed_dim=32, pooled_projection_dim=16,
                 rope_axes_dim=(8, 12, 12))  # fmt: skip
    kind = dict(num_layers=1, num_single_layers=2, num_refiner_layers=1, **(small if tiny else {}))
    model = weights(HunyuanVideoTransformer3DModel, kind, device)
    text, d = (8, 32) if tiny else (256, 4096)
    call = dict(
        **latents(grid, device), timestep=torch.tensor([500.0], device=device),
        encoder_hidden_states=random(1, text, d, device=device), pooled_projections=random(
            1, 16 if tiny else 768, device=device),
        encoder_attention_mask=torch.ones(1, text, dtype=torch.long, device=device),
        guidance=torch.tensor([6000.0], device=device), return_dict=False,
    )  # fmt: skip
    call["timestep"], call["guidance"] = (call[n].to(call["hidden_states"].dtype) for n in ("timestep", "guidance"))
    return model, call, grid, {"transformer_blocks": 20, "single_transformer_blocks": 40}


def wan(device: str, tiny: bool) -> tuple[torch.nn.Module, dict, tuple[int, int, int], dict[str, int]]:
    grid = (5, 8, 8) if tiny else (21, 45, 80)
    small = dict(num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=64)
    model = weights(WanTransformer3DModel, dict(num_layers=2, **(small if tiny else {})), device)
    text = (8, 32) if tiny else (512, 4096)
    call = dict(
        **latents(grid, device), timestep=torch.tensor([500], device=device),
        encoder_hidden_states=random(1, *text, device=device), return_dict=False,
    )  # fmt: skip
    return model, call, grid, {"blocks": 40}


MODELS = {"wan-14b": wan, "hunyuan": hunyuan}


def dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def random(*sizes: int, device: str) -> torch.Tensor:
    return torch.randn(*sizes, device=device, dtype=dtype(device))


def latents(grid: tuple[int, int, int], device: str) -> dict:
    frames, rows, cols = grid
    return {"hidden_states": random(1, 16, frames, 2 * rows, 2 * cols, device=device)}


def weights(cls: type, kind: dict, device: str) -> torch.nn.Module:
    """Random weights; tables that the network computes itself (rotary embeddings) stay."""
    with torch.device(device):
        model = cls(**kind)
    kept = cls._keep_in_fp32_modules or ()
    for name, p in model.named_parameters():
        if not any(part in name for part in kept):
            p.data = p.data.to(dtype(device))
        p.data.normal_(0.0, 0.02) if p.ndim > 1 else p.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


class BlockTimer:
    """Milliseconds of the blocks in the given lists of a model, by events before and after each."""

    def __init__(self, model: torch.nn.Module, lists: dict[str, int], device: str):
        self.device, self.marks, self.handles = device, defaultdict(list), []
        for name in lists:
            for block in getattr(model, name):
                self.handles.append(
                    block.register_forward_pre_hook(lambda *a, n=name: self.marks[n].append(self.now()))
                )
                self.handles.append(block.register_forward_hook(lambda *a, n=name: self.marks[n].append(self.now())))

    def now(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, list[float]]:
        """Of the calls since the last time."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        found = {}
        for name, marks in self.marks.items():
            pairs = list(zip(marks[::2], marks[1::2], strict=True))
            found[name] = [1000 * (b - a) if self.device == "cpu" else a.elapsed_time(b) for a, b in pairs]
        self.marks.clear()
        return found


@torch.no_grad()
def measure(model, call: dict, lists: dict[str, int], timer: BlockTimer, budget: float, device: str) -> dict:
    """A step of the whole network from its blocks' medians, in milliseconds."""
    model(**call)
    timer.take()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    blocks, rests, start = defaultdict(list), [], time.time()
    while not rests or (len(rests) < 10 and time.time() - start < budget):
        whole = milliseconds(lambda: model(**call), device)
        each = timer.take()
        rests.append(whole - sum(map(sum, each.values())))
        for name, times in each.items():
            blocks[name] += times
    medians = {name: statistics.median(times) for name, times in blocks.items()}
    rest = statistics.median(rests)
    peak = None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return dict(
        scaled_ms=round(rest + sum(lists[n] * ms for n, ms in medians.items()), 2), rest_ms=round(rest, 2),
        block_ms=" ".join(f"{n} {ms:.2f}" for n, ms in medians.items()), peak_gib=peak, calls=len(rests),
    )  # fmt: skip


def run(name: str, args: argparse.Namespace, write) -> None:
    """All rows of one network."""
    model, call, grid, lists = MODELS[name](args.device, args.tiny)
    timer = BlockTimer(model, lists, args.device)
    cudnn = dispatch.AttentionBackendName._NATIVE_CUDNN if args.device != "cpu" else None
    windows = TINY_WINDOWS if args.tiny else WINDOWS
    tokens, first = grid[0] * grid[1] * grid[2], next(iter(windows.values()))

    def dense(query, key, value, attn_mask=None, **kwargs):  # no text is padded here
        return dispatch.dense(query, key, value, backend=cudnn)

    def flex(query, key, value, attn_mask=None, **kwargs):
        text = query.shape[1] - tokens
        if query.shape[1] != key.shape[1] or text < 0:
            return dispatch.dense(query, key, value, backend=cudnn)
        return local_attention(query, key, value, grid, first, text=text, text_first=False, backend="flex")

    def cross_only(query, key, value, attn_mask=None, **kwargs):
        return query if query.shape[1] == key.shape[1] and query.shape[1] >= tokens else dense(query, key, value)

    plain = {"dense": dense, "stub": cross_only, f"flex, {next(iter(windows))}": flex}
    for row in ("dense", next(iter(windows)), "stub", *list(windows)[1:], list(plain)[-1]):
        if time.time() - args.started > args.seconds:
            print(f"{name} {row}: left out, the time is up", flush=True)
            continue
        try:
            if row in plain:
                with Backend(model, dispatch.add_backend(plain[row])):
                    found = measure(model, call, lists, timer, args.budget, args.device) | {"how": "scaled"}
            else:
                with sparsify(model, windows[row]) as handle:
                    found = measure(model, call, lists, timer, args.budget, args.device)
                    reasons = {r["reason"] for r in handle.report().rows} - {None}
                    found["how"] = f"dense: {reasons.pop()}" if reasons else "scaled"
        except Exception as e:
            timer.marks.clear()
            found = {"how": f"failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"}
        write(name, row, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budget", type=float, default=2.5, help="seconds a measurement may take")
    parser.add_argument("--seconds", type=float, default=150.0, help="no new row after this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="narrow networks and few tokens: that the script runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: use --device cpu --tiny to see that the script runs")
    args.started = time.time()
    gpu = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(0)
    version = torch.__version__.split("+")[0]
    default = Path(__file__).parent / "results" / f"video-{gpu.lower().replace(' ', '-')}-torch{version}.csv"
    out, rows = args.out or default, []

    def write(model: str, row: str, found: dict) -> None:
        dense = next((r.get("scaled_ms") for r in rows if (r["model"], r["row"]) == (model, "dense")), None)
        dense = found.get("scaled_ms") if row == "dense" else dense
        if dense and found.get("scaled_ms") and row != "stub":
            found["over_dense"] = round(dense / found["scaled_ms"], 3)
        rows.append(dict(gpu=gpu, torch=version, model=model, row=row, **found))
        write_csv(out, COLUMNS, rows)
        print(model, row, found, flush=True)

    torch.manual_seed(0)
    for name in args.models:
        run(name, args, write)
        if args.device != "cpu":
            torch.cuda.empty_cache()
    print(f"written to {out}; {time.time() - args.started:.0f} s")


if __name__ == "__main__":
    main()

"""A denoising step of FLUX.1-dev's exact architecture (random weights): dense against patched, eager and compiled.

    python benchmarks/flux.py                          # 1024 to 8192 px, eager; about 8 minutes on an H100
    python benchmarks/flux.py --compile --seconds 290  # also compiled; what the goals are about comes first
    python benchmarks/flux.py --device cpu --tiny --compile --sizes 512 --budget 0.1     # that the script runs

Two GPUs share the sizes and one table:

    CUDA_VISIBLE_DEVICES=0 python benchmarks/flux.py --compile --keep --sizes 4096 1024 &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/flux.py --compile --keep --sizes 2048 8192

Dense is cuDNN's attention in the same run. Times are medians of GPU time. At 8192 px the dense step is one attention
times the number of blocks plus the measured rest, and the row says so. ``stub`` replaces attention by nothing: what
is left is everything else. ``compiled``: ``compile_repeated_blocks(fullgraph=True)``, static shapes, Inductor's default
mode. The table is written anew after each row, under a temporary name first.
"""

import argparse
import csv
import fcntl
import io
import os
import statistics
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import visionattn
from visionattn._files import atomic_write
from visionattn.diffusion import dispatch, sparsify

PATTERNS = {
    "disk8": visionattn.Disk(8),
    "disk16": visionattn.Disk(16),
    "disk32": visionattn.Disk(32),
    "window80s16": visionattn.Neighborhood(80, stride=16),
}
COLUMNS = (
    "gpu", "torch", "size", "row", "mode", "ms", "over_dense", "over_eager_dense", "peak_gib", "calls", "first_s",
    "how",
)  # fmt: skip
TEXT = 512


def shape(tiny: bool) -> dict:
    """Arguments of FLUX.1-dev's transformer, or of a narrow one of its form."""
    if tiny:
        return dict(in_channels=64, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
                    pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(8, 12, 12))  # fmt: skip
    return dict(in_channels=64, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
                pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))  # fmt: skip


def random_weights(make, device: str) -> torch.nn.Module:
    """A network made on ``device`` with random weights, in bfloat16 (float32 on a CPU); the same after one seed."""
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16 if device != "cpu" else torch.float32).to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(0.0, 0.02) if p.ndim > 1 else p.data.fill_(1.0 if p.shape == (128,) else 0.0)
    return model.eval().requires_grad_(False)


def build(double: int = 19, single: int = 38, device: str = "cuda", tiny: bool = False) -> torch.nn.Module:
    """FLUX.1-dev's transformer with random weights in bfloat16, made on the GPU."""
    kind = dict(num_layers=double, num_single_layers=single, **shape(tiny))
    return random_weights(lambda: FluxTransformer2DModel(**kind), device)


def inputs(size: int, device: str = "cuda", joint: int = 4096) -> dict:
    side = size // 16
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None, :]
    kind = {"device": device, "dtype": torch.bfloat16 if device != "cpu" else torch.float32}
    return dict(
        hidden_states=torch.randn(1, side * side, 64, **kind),
        encoder_hidden_states=torch.randn(1, TEXT, joint, **kind),
        pooled_projections=torch.randn(1, 768, **kind), timestep=torch.full((1,), 0.5, **kind),
        img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(TEXT, 3, device=device),
        guidance=torch.full((1,), 3.5, **kind),
        return_dict=False,
    )  # fmt: skip


def milliseconds(call, device: str) -> float:
    """Of one call: GPU time, or wall time on a CPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@torch.no_grad()
def measure(model: torch.nn.Module, call: dict, budget: float, device: str = "cuda") -> dict:
    """Median milliseconds of a step within about ``budget`` seconds after one that is not counted, and peak memory."""
    start = time.time()
    milliseconds(lambda: model(**call), device)
    first = time.time() - start
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times, start = [], time.time()
    while not times or (len(times) < 10 and time.time() - start < budget):
        times.append(milliseconds(lambda: model(**call), device))
    peak = None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return dict(ms=statistics.median(times), calls=len(times), first_s=round(first, 1), peak_gib=peak)


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


class Blocks:
    """The repeated blocks, compiled or as they were."""

    def __init__(self, model: torch.nn.Module, device: str):
        names = model._repeated_blocks
        self.blocks = [m for m in model.modules() if type(m).__name__ in names]
        self.backend = "inductor" if device != "cpu" else "eager"

    def compile(self, yes: bool) -> None:
        """Graphs of an earlier row are dropped: torch.compile keeps eight of a kind of block at most."""
        torch._dynamo.reset()
        for block in self.blocks:
            block._compiled_call_impl = None
            if yes:
                block.compile(fullgraph=True, dynamic=False, backend=self.backend)


@torch.library.custom_op("visionattn_benchmark::no_attention", mutates_args=())
def no_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


@no_attention.register_fake
def _(query, key, value):
    return torch.empty_like(query)


def stub(query, key, value, **kwargs):
    # an operator that asks for all three: a compiler would drop the projections of keys and values that nobody reads
    return no_attention(query, key, value)


def attention_of_all_blocks(model: torch.nn.Module, call: dict, cudnn, device: str) -> float:
    """Milliseconds of one dense attention times the number of blocks."""
    attn = model.transformer_blocks[0].attn
    n = call["hidden_states"].shape[1] + TEXT
    q = torch.randn(1, n, attn.heads, attn.head_dim, device=device, dtype=call["hidden_states"].dtype)
    with torch.no_grad():
        one = min(milliseconds(lambda: dispatch.dense(q, q, q, backend=cudnn), device) for _ in range(2))
    return one * (len(model.transformer_blocks) + len(model.single_transformer_blocks))


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """A whole table, or the one before."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


class Table:
    """Rows by (size, row, mode); the file is whole after each.

    Args:
        keep: also keep the file's rows, but for failed ones and those of other GPUs and releases of PyTorch; the file
            may be another process's too.
    """

    def __init__(self, out: Path, device: str, keep: bool = False):
        self.out, self.rows, self.keep = out, {}, keep
        gpu = "cpu" if device == "cpu" else torch.cuda.get_device_name(0)
        self.about = dict(gpu=gpu, torch=torch.__version__.split("+")[0])
        self.read()

    def read(self) -> None:
        """Takes the file's rows that are not here."""
        if not self.keep or not self.out.is_file():
            return
        with open(self.out, newline="") as file:
            for r in csv.DictReader(file):
                if r["ms"] and (r["gpu"], r["torch"]) == (self.about["gpu"], self.about["torch"]):
                    values = r | {"size": int(r["size"]), "ms": float(r["ms"])}
                    self.rows.setdefault((int(r["size"]), r["row"], r["mode"]), values)

    def add(self, size: int, row: str, mode: str, **found) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.out.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.read()
            self._add(size, row, mode, found)
        finally:
            os.close(folder)

    def _add(self, size: int, row: str, mode: str, found: dict) -> None:
        self.rows[size, row, mode] = dict(**self.about, size=size, row=row, mode=mode, **found)
        for (s, r, m), values in self.rows.items():
            for column, against in (("over_dense", m), ("over_eager_dense", "eager")):
                dense = self.ms(s, "dense", against)
                if dense and values.get("ms") and r != "stub":
                    values[column] = round(dense / values["ms"], 3)
        order = sorted(self.rows, key=lambda k: (k[2] != "eager", k[0]))
        rows = [{k: f"{v:.2f}" if k == "ms" and v else v for k, v in self.rows[o].items()} for o in order]
        write_csv(self.out, COLUMNS, rows)
        shown = {
            k: v for k, v in self.rows[size, row, mode].items() if k not in ("gpu", "torch", "size", "row", "mode")
        }
        print(size, row, mode, shown, flush=True)

    def ms(self, size: int, row: str, mode: str) -> float | None:
        return self.rows.get((size, row, mode), {}).get("ms")


def jobs(sizes: list[int], rows: list[str], compiled: bool) -> list[tuple[int, str, str]]:
    """(size, row, mode) in order of importance; ``compiled``: no pattern that covers the grid, it would be dense."""
    if not compiled:
        return [(size, row, "eager") for size in sizes for row in ("stub", "dense", *rows)]

    def worth(size: int, row: str) -> bool:
        return not (size >= 8192 and row.startswith("window")) and not PATTERNS[row].dense((size // 16,) * 2)

    order = []
    for size in sizes:
        order += [(size, "stub", "eager")] if size >= 8192 else []
        order.append((size, "dense", "eager"))
        order += [(size, row, "compiled") for row in rows if worth(size, row)]
        order += [(size, "stub", "compiled")] if size >= 8192 else []
        order.append((size, "dense", "compiled"))
    order += [(size, row, "eager") for row in rows for size in sizes if worth(size, row)]
    order += [(size, "stub", mode) for mode in ("compiled", "eager") for size in sizes if size < 8192]
    return order


def one(model, size: int, row: str, mode: str, call: dict, table: Table, args) -> dict:
    """What one row found."""
    cudnn = dispatch.AttentionBackendName._NATIVE_CUDNN if args.device != "cpu" else None
    if row == "stub":
        with Backend(model, args.nothing):
            return measure(model, call, args.budget, args.device) | {"how": "measured"}
    if row == "dense" and size >= 8192:
        rest = table.ms(size, "stub", mode)
        if rest is None:
            return {"how": "failed: the step without attention was not measured"}
        ms = rest + attention_of_all_blocks(model, call, cudnn, args.device)
        return {"ms": ms, "how": "one attention x blocks + rest"}
    if row == "dense":
        with Backend(model, cudnn):
            return measure(model, call, args.budget, args.device) | {"how": "measured"}
    with Backend(model, cudnn), sparsify(model, PATTERNS[row]) as handle:
        found = measure(model, call, args.budget, args.device)
        stays = next(iter(handle.sessions[0].layers.values())).pattern.dense((size // 16,) * 2)
        reasons = {r["reason"] for r in handle.report().rows} - {None}
    reason = "the pattern covers the whole grid" if stays else next(iter(reasons), None)
    return found | {"how": f"dense: {reason}" if reason else "measured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="default: 1024 2048 4096 8192")
    parser.add_argument("--rows", nargs="+", default=["disk16", "window80s16"], choices=list(PATTERNS))
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks (regional, whole graphs)")
    parser.add_argument("--budget", type=float, help="seconds a measurement may take (default 6; 3 with --compile)")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new row after this")
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a narrow network of three blocks: that the script runs")
    parser.add_argument("--keep", action="store_true", help="the table's rows stay, and are not measured again")
    parser.add_argument("--again", nargs="+", default=[], help="rows that are measured anew even so")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: use --device cpu --tiny to see that the script runs")
    args.budget = args.budget or (3.0 if args.compile else 6.0)
    sizes = args.sizes or ([4096, 2048, 8192, 1024] if args.compile else [1024, 2048, 4096, 8192])
    started = time.time()
    gpu = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(0)
    name = "flux-compiled" if args.compile else "flux"
    version = torch.__version__.split("+")[0]
    default = Path(__file__).parent / "results" / f"{name}-{gpu.lower().replace(' ', '-')}-torch{version}.csv"
    table = Table(args.out or default, args.device, args.keep)
    torch.manual_seed(0)
    model = build(*((1, 2) if args.tiny else (args.double, args.single)), args.device, args.tiny)
    blocks, calls = Blocks(model, args.device), {}
    args.nothing = dispatch.add_backend(stub)
    for size, row, mode in jobs(sizes, args.rows, args.compile):
        follows = row == "dense" and size >= 8192 and "stub" in args.again  # computed from it
        if table.ms(size, row, mode) and row not in args.again and not follows:
            continue
        if time.time() - started > args.seconds:
            print(f"{size} px {row} {mode}: left out, the time is up", flush=True)
            continue
        if size not in calls:
            calls.clear()
            if args.device != "cpu":
                torch.cuda.empty_cache()
            calls = {size: inputs(size, args.device, shape(args.tiny)["joint_attention_dim"])}
        try:
            blocks.compile(mode == "compiled" and not (row == "dense" and size >= 8192))
            found = one(model, size, row, mode, calls[size], table, args)
        except Exception as e:
            found = {"how": f"failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"}
        table.add(size, row, mode, **found)
    print(f"written to {table.out}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()

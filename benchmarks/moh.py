"""Mixture-of-head attention at inference against dense fused attention, and whole networks.

    python benchmarks/moh.py                        # operator, DiT and MoH-ViT, about 8 minutes on an H100
    python benchmarks/moh.py --parts operator --seconds 60     # stops after a minute, keeps what it has
    python benchmarks/moh.py --tune --seconds 100   # other tiles, each checked first in a process of its own

The operator's times are GPU times of CUDA graphs (of events where a backend cannot be captured), medians over runs in
turns, after outputs agree. `dense` is PyTorch's scaled_dot_product_attention alone, without gates; at 1024 tokens the
kernels are timed one by one too, beside a memset of the output.
Writes benchmarks/results/moh-<gpu>-torch<version>.csv (or --out), and prints a table.
"""

import argparse
import csv
import gc
import itertools
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import triton

import visionattn
from visionattn.layers.moh import pop_aux_loss, split_heads
from visionattn.ops.moh import fused, gluon, moh_attention, top_k_gates

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS = {"16 x 64": (16, 64), "16 x 72": (16, 72), "32 x 64": (32, 64)}
ACTIVE = (0.9, 0.75, 0.5)


def problem(tokens: int, heads: int, dim: int, active: float, skew: float, batch_tokens: int):
    """q, k, v as one projection makes them, and gates; `skew` makes some heads more popular than others."""
    torch.manual_seed(0)
    batch = max(1, batch_tokens // tokens)
    qkv = torch.randn(batch, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    shared, k = split_heads(heads, active)
    pool = heads - shared
    logits = torch.randn(batch, tokens, pool, device="cuda") + skew * torch.linspace(-1, 1, pool, device="cuda")
    routed, _, _ = top_k_gates(logits, k)
    gates = torch.cat([torch.ones(batch, tokens, shared, device="cuda"), routed], dim=-1)
    return (*qkv.unbind(2), gates)


def dense(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def captured(run):
    """`run` as a CUDA graph, or itself where that cannot be."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "events"


def in_turns(runs: dict, repeats: int = 10, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds of each."""
    times = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def agree(got, expected, what: str, limit: float = 0.02) -> None:
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= limit:
        raise RuntimeError(f"{what}: outputs differ by {error:.3g}, so nothing is timed")


def run_candidate(name: str, q, k, v, gates, listed=None):
    """`triton:` and the numbers of fused.Tiles (registers 0 for None), or `gluon:` and those of gluon.Setting.

    Without numbers: what the library takes.
    """
    kind, _, numbers = name.partition(":")
    numbers = [int(x) for x in numbers.split(",") if x]
    scale = q.shape[-1] ** -0.5
    if kind == "triton":
        tiles = None
        if numbers:
            tiles = fused.Tiles(*numbers[:4], bool(numbers[4]), bool(numbers[5]), numbers[6] or None)
        return fused.forward(q, k, v, gates, scale, tiles, listed)
    setting = gluon.SETTING
    if numbers:
        setting = gluon.Setting(*numbers[:3], tuple(numbers[3:5]), numbers[5], *map(bool, numbers[6:]))
    return gluon.forward(q, k, v, gates, scale, setting, listed)


@torch.no_grad()
def check_candidate(name: str, dim: int) -> None:
    """Raises unless the kernel is right, also on odd sizes and heads nobody or everybody chose, and the same twice."""
    for batch, tokens, keys, heads, share in ((2, 777, 777, 5, 0.4), (1, 40, 300, 3, 0.5), (8, 1024, 1024, 16, 0.6)):
        torch.manual_seed(0)
        q = torch.randn(batch, tokens, heads, dim, device="cuda").bfloat16()
        k, v = torch.randn(batch, keys, 2, heads, dim, device="cuda").bfloat16().unbind(2)
        gates = torch.rand(batch, tokens, heads, device="cuda") + 0.5
        gates = gates * (torch.rand(batch, tokens, heads, device="cuda") < share)
        gates[..., 0], gates[..., 1] = 0.0, 1.0
        expected = moh_attention(q.float(), k.float(), v.float(), gates, backend="dense")
        for _ in range(3):
            got = run_candidate(name, q, k, v, gates)
            agree(got, expected, f"{name} at {batch} x {tokens}", 0.006)
            if not torch.equal(got, run_candidate(name, q, k, v, gates)) or got[gates == 0].any():
                raise RuntimeError(
                    f"{name} at {batch} x {tokens}: differs between runs, or is not 0 where nobody looks"
                )


def pieces(q, k, v, gates, kinds) -> dict:
    """The kernels one by one."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    found = {"memset of the output": out.zero_}
    for kind in kinds:
        if ":" in kind:
            continue
        parts = gluon.SETTING.groups if kind == "gluon" else 0
        listed = fused.list_tokens(gates, parts)
        found[f"{kind}: list"] = lambda p=parts: fused.list_tokens(gates, p)
        found[f"{kind}: attention"] = lambda n=kind, listed=listed: run_candidate(n, q, k, v, gates, listed)
    return found


@torch.no_grad()
def bench_operator(args, report) -> None:
    kinds = [k for k in args.implementations if k.startswith(("triton", "gluon"))]
    for (kind, dim), error in checked(itertools.product(kinds, {HEADS[h][1] for h in args.heads})).items():
        if error:
            print(f"{kind}, {dim} channels: {error}", flush=True)
            kinds = [k for k in kinds if k != kind]
    for active, tokens, label in itertools.product(ACTIVE, args.tokens, args.heads):
        heads, dim = HEADS[label]
        for skew in (0.0, 1.0) if args.skew and (tokens, active) in ((1024, 0.75), (4096, 0.75)) else (0.0,):
            if time.time() > args.until:
                return print("out of time", flush=True)
            q, k, v, gates = problem(tokens, heads, dim, active, skew, args.batch_tokens)
            calls = {"dense": lambda q=q, k=k, v=v: dense(q, k, v)}
            for name in [n for n in ("dense, gates", "gather") if n in args.implementations]:
                backend = name.partition(",")[0]
                calls[name] = lambda b=backend, q=q, k=k, v=v, g=gates: moh_attention(q, k, v, g, backend=b)
            for name in kinds:
                calls[name] = lambda n=name, q=q, k=k, v=v, g=gates: run_candidate(n, q, k, v, g)
            expected = dense(q, k, v) * gates.unsqueeze(-1).bfloat16()
            for name in list(calls)[1:]:
                agree(calls[name](), expected, f"{name} at {tokens} tokens")
            if (tokens, active) == (1024, 0.75):
                calls |= pieces(q, k, v, gates, kinds)
            runs, how = {}, {}
            for name, call in calls.items():
                runs[name], how[name] = captured(call)
            what = f"{label}, {len(q)} x {tokens}" + (", skewed" if skew else "")
            report("operator", what, active, in_turns(runs), "dense", how)
            del calls, runs, expected, q, k, v, gates
            gc.collect()
            torch.cuda.empty_cache()


CANDIDATES = {
    64: (
        "triton:128,64,4,3,1,1,168", "triton:128,64,4,3,0,1,168", "triton:128,64,4,4,1,1,168",
        "triton:128,64,4,3,1,0,0", "gluon:2,128,4,232,40,1,1,0", "gluon:2,128,4,232,40,1,0,0",
        "gluon:2,128,4,232,40,1,1,1", "gluon:2,128,4,232,40,1,0,1", "gluon:3,64,6,160,32,1,0,0",
        "gluon:3,64,6,160,32,1,0,1",
    ),
    72: (
        "triton:128,64,4,2,0,1,0", "gluon:2,128,4,232,40,1,1,0", "gluon:2,128,4,232,40,1,0,0",
        "gluon:2,128,4,232,40,1,1,1", "gluon:2,128,4,232,40,1,0,1",
    ),
}  # fmt: skip


def in_process(name: str, dim: int) -> str:
    """'' if the kernel passes :func:`check_candidate`; a process of its own, since a deadlock could not be ended."""
    command = [sys.executable, __file__, "--check", name, "--dim", str(dim)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return "did not end"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1][:300]


def checked(candidates) -> dict[tuple[str, int], str]:
    """What :func:`in_process` says of each, twelve at once."""
    candidates = list(candidates)
    with ThreadPoolExecutor(12) as pool:
        return dict(zip(candidates, pool.map(lambda c: in_process(*c), candidates), strict=True))


@torch.no_grad()
def tune(args) -> None:
    """Times of other tiles, for visionattn/ops/moh/fused.py and gluon.py."""
    candidates = [(name, dim) for dim in args.dims for name in CANDIDATES[dim]]
    errors = checked(candidates)
    for (name, dim), error in errors.items():
        if error:
            print(f"{name}, {dim} channels: {error}")
    print(f"checked {len(errors)} in {time.time() - args.start:.0f} s", flush=True)
    for tokens, active, dim in itertools.product((1024, 4096), (0.75, 0.5), args.dims):
        q, k, v, gates = problem(tokens, 16, dim, active, 0.0, args.batch_tokens)
        reference = in_turns({"dense": captured(lambda q=q, k=k, v=v: dense(q, k, v))[0]})["dense"]
        print(f"16 x {dim}, {tokens} tokens, {active}: dense {reference:.4f} ms", flush=True)
        found = []
        for name in [n for n, d in candidates if d == dim and not errors[n, d]]:
            if time.time() > args.until:
                print("out of time")
                break
            run = captured(lambda n=name, q=q, k=k, v=v, g=gates: run_candidate(n, q, k, v, g))[0]
            found.append((in_turns({"": run}, 8, 1)[""], name))
        for ms, name in sorted(found):
            print(f"  {ms:.4f} ms, {ms / reference:.3f} of dense: {name}", flush=True)
        if time.time() > args.until:
            return


@torch.no_grad()
def bench_dit(args, report) -> None:
    for size, batch in ((32, 64), (64, 16), (128, 4)):
        models = {}
        for name in ("dit_xl_2", "moh_dit_xl_2_75"):
            torch.manual_seed(0)
            models[name] = visionattn.create_dit(name, input_size=size, device="cuda").eval()
        for backend in ("dense", "triton"):
            torch.manual_seed(0)
            model = visionattn.create_dit("moh_dit_xl_2_75", input_size=size, backend="dense", device="cuda").eval()
            for block in model.blocks:
                block.attn.backend = "dense" if block.attn.routed_head == 0 else backend
            models[f"moh_dit_xl_2_75, {backend}"] = model
        x = torch.randn(batch, 4, size, size, device="cuda")
        t, y = torch.randint(0, 1000, (2, batch), device="cuda")

        def step(model, x=x, t=t, y=y):
            with torch.autocast("cuda", torch.bfloat16):
                return model(x, t, y)

        runs = {n: (lambda m=m, step=step: step(m)) for n, m in models.items()}
        report("DiT step", f"{batch} x {(size // 2) ** 2} tokens", "", in_turns(runs, 5), "dit_xl_2", {}, batch)
        del models, runs
        gc.collect()
        torch.cuda.empty_cache()


def bench_vit(args, report) -> None:
    """Batch 64, 224 px, bf16 autocast; eager and compiled; the yardstick is timm's swin_tiny in the same run.

    VISIONATTN_KERNELS=torch has PyTorch's operators around the attention, triton all kernels (docs/backbones.md). Every
    model is alone on the device; the yardstick is timed again at the end.
    """
    names = ("swin_tiny_patch4_window7_224", "moh_vit_small_80", "transnext_small", "swin_tiny_patch4_window7_224")
    x = torch.randn(64, 3, 224, 224, device="cuda")
    target = torch.randint(0, 1000, (64,), device="cuda")
    for mode in args.modes:
        first = {}
        for i, name in enumerate(names):
            torch.manual_seed(0)
            model = timm.create_model(name).cuda()
            program = torch.compile(model) if mode == "compile" else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

            def infer(program=program):
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                    program(x)

            def step(program=program, model=model, optimizer=optimizer):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.cross_entropy(program(x), target)
                    extra = pop_aux_loss(model)
                    loss = loss if extra is None else loss + extra
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            for what, run in (("inference", infer), ("training step", step)):
                model.train(what != "inference")
                run()
                torch.cuda.reset_peak_memory_stats()
                ms = in_turns({name: run}, 10, 2)[name]
                peak = torch.cuda.max_memory_allocated() / 2**20
                first.setdefault(what, ms)
                label = name if i < len(names) - 1 else f"{name}, again"
                report(f"ViT {what}", f"{mode}, 64 x 224 px", "", {label: ms}, "", {label: peak}, 64, first[what])
            del model, program, optimizer, infer, step
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["operator", "dit", "vit"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens in a batch of the operator's part")
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    known = ["dense, gates", "triton", "gluon"]
    parser.add_argument("--implementations", nargs="+", default=known, help="also gather, and names --tune prints")
    parser.add_argument("--heads", nargs="+", default=["16 x 64", "16 x 72"], choices=list(HEADS))
    parser.add_argument("--skew", action="store_true", help="also heads that some tokens prefer")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit of the operator's part and of --tune")
    parser.add_argument("--tune", action="store_true", help="time other tiles, and nothing else")
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 72], choices=list(CANDIDATES), help="for --tune")
    parser.add_argument("--check", help="of a kernel's name as --tune prints it: only whether it is right")
    parser.add_argument("--dim", type=int, default=64, help="for --check")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.start = time.time()
    args.until = args.start + args.seconds
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if args.check:
        return check_candidate(args.check, args.dim)
    if args.tune:
        return tune(args)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    version = torch.__version__.split("+")[0]
    out = args.out or Path(__file__).parent / "results" / f"moh-{gpu}-torch{version}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = [torch.cuda.get_device_name(), torch.__version__, triton.__version__, timm.__version__]
    environment.append(visionattn.__version__)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "what", "active", "implementation", "ms", "over_first", "per_s", "timing_or_peak_mib",
                         "gpu", "torch", "triton", "timm", "visionattn"])  # fmt: skip

        def report(part, what, active, result, first, about, batch=None, base=None) -> None:
            for name, ms in result.items():
                ratio, note = ms / (base or result[first]), about.get(name, "")
                note = note if isinstance(note, str) else f"{note:.0f}"
                rate = f"{1e3 * batch / ms:.0f}" if batch else ""
                writer.writerow([part, what, active, name, f"{ms:.4f}", f"{ratio:.3f}", rate, note, *environment])
                print(f"{part:18}{what:26}{active!s:6}{name:28}{ms:9.3f} ms  x{ratio:.3f} {rate} {note}", flush=True)
            file.flush()

        if "operator" in args.parts:
            bench_operator(args, report)
        if "dit" in args.parts:
            bench_dit(args, report)
        if "vit" in args.parts:
            bench_vit(args, report)


if __name__ == "__main__":
    main()

"""train.py's engine against a bare training loop: images/s on synthetic data, same model, batch, precision, compile.

    python benchmarks/train_loop.py                       # resnet50 and halo_h1, on a GPU
    python benchmarks/train_loop.py --compile             # both sides through torch.compile
    python benchmarks/train_loop.py --models test_ela --batch-size 4 --steps 3 --rounds 2 --device cpu

Both loops do forward, cross-entropy, backward and an SGD step; the engine does the rest of its work besides (schedule,
loss bookkeeping, progress lines, checks for signals). They take turns within one process, so that clocks and heat treat
them alike; a side's figure is the median of its rounds. Writes benchmarks/results/train-loop-<environment>.json.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch

import visionattn  # noqa: F401
from visionattn._world import World
from visionattn.training import config
from visionattn.training.engine import Trainer

DEFAULTS = {"resnet50": (224, 128), "halo_h1": (256, 64)}  # image side and batch
ASKED = 0.97


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Engine:
    """The Trainer of train.py over its synthetic loader."""

    def __init__(self, name: str, side: int, batch: int, args: argparse.Namespace, device: torch.device):
        cfg = config.make({
            "dataset": "synthetic", "num_classes": 1000, "synthetic_images": batch * args.steps, "model": name,
            "img_size": side, "batch_size": batch, "opt": "momentum", "lr": 1e-3, "sched": "cosine", "epochs": 1000,
            "amp": args.amp, "channels_last": args.channels_last, "compile": args.compile, "device": str(device),
        })  # fmt: skip
        self.trainer = Trainer(cfg, World(device))

    def run(self, steps: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train_epoch()
        self.trainer.epoch, self.trainer.batch = self.trainer.epoch + 1, 0


class Bare:
    """The shortest loop that trains."""

    def __init__(self, name: str, side: int, batch: int, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = timm.create_model(name, num_classes=1000).to(device, memory_format=layout).train()
        self.model = torch.compile(model) if args.compile else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
        self.y = torch.randint(1000, (batch,), device=device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[args.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def run(self, steps: int) -> None:
        device = self.x.device.type
        for _ in range(steps):
            with torch.autocast(device, self.dtype) if self.dtype else contextlib.nullcontext():
                loss = torch.nn.functional.cross_entropy(self.model(self.x), self.y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()


def compare(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Images/s of both loops, and their ratio."""
    side, batch = DEFAULTS.get(name, (224, 64))
    side, batch = args.img_size or side, args.batch_size or batch
    loops = {kind.__name__.lower(): kind(name, side, batch, args, device) for kind in (Bare, Engine)}
    for loop in loops.values():  # compilation, algorithm search, allocator
        loop.run(args.steps)
        synchronize(device)
    rates: dict[str, list[float]] = {kind: [] for kind in loops}
    for i in range(args.rounds):
        order = list(loops) if i % 2 == 0 else list(loops)[::-1]
        for kind in order:
            synchronize(device)
            start = time.perf_counter()
            loops[kind].run(args.steps)
            synchronize(device)
            rates[kind].append(batch * args.steps / (time.perf_counter() - start))
    result = {"model": name, "img_size": side, "batch_size": batch}
    result |= {f"{kind}_images_per_s": round(statistics.median(r), 1) for kind, r in rates.items()}
    result |= {f"{kind}_rounds": [round(v, 1) for v in r] for kind, r in rates.items()}
    result["ratio"] = round(statistics.median(rates["engine"]) / statistics.median(rates["bare"]), 4)
    return result


def main() -> int:
    """Returns 1 if a ratio is below the 0.97 that is asked for."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=list(DEFAULTS))
    p.add_argument("--batch-size", type=int, default=0)
    p.add_argument("--img-size", type=int, default=0)
    p.add_argument("--steps", type=int, default=60, help="updates of one round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--amp", choices=("none", "bf16", "fp16"), default="bf16")
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--output", default=str(Path(__file__).parent / "results"), help="folder; '' writes no file")
    args = p.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as train.py sets them
        torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows = []
    for model in args.models:
        rows.append(compare(model, args, device))
        row = rows[-1]
        print(f"{model}: engine {row['engine_images_per_s']} images/s, bare loop {row['bare_images_per_s']}, "
              f"ratio {row['ratio']}", flush=True)  # fmt: skip
    report = {
        "device": name, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
        "amp": args.amp, "channels_last": args.channels_last, "compile": args.compile, "steps": args.steps,
        "results": rows,
    }  # fmt: skip
    if args.output:
        kind = f"{args.amp}{'-compile' if args.compile else ''}"
        device_name = name.lower().replace(" ", "-")
        path = Path(args.output) / f"train-loop-{kind}-pt{torch.__version__.split('+')[0]}-{device_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(path)
    return int(min(r["ratio"] for r in rows) < ASKED)


if __name__ == "__main__":
    raise SystemExit(main())

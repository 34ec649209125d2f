r"""Training throughput and peak memory of Mask R-CNN with different backbones, in turns within one run. No COCO needed.

    python benchmarks/detection.py                              # 800 x 1333
    python benchmarks/detection.py --settings bf16:4 --configs agent_pvt/mask-rcnn_agent-pvt-t_fpn_1x_coco.py
    python benchmarks/detection.py --device cpu --size 64 96 --settings fp32:1 bf16:1 --rounds 1 --steps 2 --warmup 1 \
        --configs demo/mask-rcnn_test-mala_fpn_demo.py                          # whether it runs

A config is a file below configs/detection, or ``mmdet::PATH`` for one of mmdet's own; ``CONFIG@MODEL`` puts
``visionattn.Backbone`` with a model of the zoo or of timm in place of its backbone. Pictures, boxes and masks are
random, weights too: the first proposals are what an untrained network proposes, the same for all. A step is forward,
losses, backward and AdamW's step; bf16 and fp16 are autocast (fp16 with loss scaling), fp32 is PyTorch's default.
Every model has a turn in every round; times are medians over rounds, ratios are to the last config. The peak is that
of a training step, without the weights and moments of the other models. A setting's rows go to the CSV file when it is
done; no setting begins after ``--seconds``. On an H100 the first setting with two rounds took a minute and a half.
"""

import argparse
import csv
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mmdet
import torch

import visionattn.detection  # noqa: F401  operators and registrations, before mmdet's models

SWIN = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
CONFIGS = [
    "agent_swin/mask-rcnn_agent-swin-t_fpn_ms-crop-1x_coco.py",
    "mala/mask-rcnn_mala-t_fpn_amp-1x_coco.py",
    f"{SWIN}@swin_tiny_patch4_window7_224",
    SWIN,
]
SETTINGS = ["bf16:2", "fp32:2", "bf16:8", "fp16:2", "bf16:16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIELDS = [
    "config", "backbone", "precision", "height", "width", "batch", "images_per_s", "ms_per_step", "spread", "turns",
    "ratio", "peak_GiB", "Mparams", "loss", "note", "kernels", "device", "torch", "mmdet",
]  # fmt: skip
FOLDER = Path(__file__).resolve().parents[1] / "configs" / "detection"


def load(name: str):
    """The config of a name, with the backbone that the name asks for."""
    from mmengine.config import Config
    from mmengine.hub import get_config

    path, _, backbone = name.partition("@")
    cfg = get_config(path) if path.startswith("mmdet::") else Config.fromfile(FOLDER / path)
    if backbone:
        cfg.model.backbone = dict(type="visionattn.Backbone", model=backbone, out_indices=(0, 1, 2, 3), out_norm=True)
        from mmdet.registry import MODELS

        with torch.device("meta"):
            cfg.model.neck.in_channels = list(MODELS.build(cfg.model.backbone).out_channels)
    return cfg


class Case:
    """One detector with its optimizer."""

    def __init__(self, name: str, device: str):
        from mmdet.registry import MODELS
        from mmengine.model import revert_sync_batchnorm

        torch.manual_seed(0)
        cfg = load(name)
        self.name, self.device = name, device
        backbone = cfg.model.backbone
        self.backbone = backbone.get("model", f"mmdet's {backbone.type}")
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.05)
        self.params = sum(p.numel() for p in self.model.parameters())

    def begin(self, data: dict, precision: str) -> None:
        """A new setting."""
        self.data, self.dtype, self.times = data, TYPES[precision], []
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16")
        self.loss: torch.Tensor | None = None

    def step(self) -> None:
        data = self.model.data_preprocessor(self.data, True)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(**data, mode="loss")
        self.loss, _ = self.model.parse_losses(losses)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(self.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def turn(self, steps: int) -> None:
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(self.device)
        self.times.append((time.perf_counter() - start) / steps)

    def stays(self) -> int:
        """Bytes that this model keeps between steps: weights, buffers, moments."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.nbytes for t in tensors if t.device.type == "cuda")

    def peak(self) -> float | str:
        """GiB at the most in a step; empty on a CPU."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device != "cuda":
            return ""
        free()
        others = torch.cuda.memory_allocated() - self.stays()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        peak = torch.cuda.max_memory_allocated() - others
        self.optimizer.zero_grad(set_to_none=True)
        return round(peak / 2**30, 2)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pictures(batch: int, height: int, width: int) -> dict:
    """A batch of random pictures with eight objects each, as mmdet's data loaders give it."""
    from mmdet.testing import demo_mm_inputs

    shapes = [[3, height, width]] * batch
    return demo_mm_inputs(batch, shapes, num_items=[8] * batch, num_classes=10, with_mask=True)


def attempt(row: dict, call) -> bool:
    """Whether the call ended well; what went wrong becomes the row's note, the other models go on."""
    try:
        call()
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return not row["note"]


def measure(cases: list[Case], precision: str, batch: int, args: argparse.Namespace) -> Iterator[dict]:
    """Rows of one setting."""
    data = pictures(batch, *args.size)
    rows = {
        case.name: dict(
            config=case.name, backbone=case.backbone, precision=precision, height=args.size[0], width=args.size[1],
            batch=batch, Mparams=round(case.params / 1e6, 2), note="",
        )
        for case in cases
    }  # fmt: skip

    def warm(case: Case) -> None:
        case.begin(data, precision)
        for _ in range(args.warmup):
            case.step()
        rows[case.name]["peak_GiB"] = case.peak()

    running = []
    for case in cases:
        if attempt(rows[case.name], lambda case=case: warm(case)):
            running.append(case)
        else:
            case.optimizer.zero_grad(set_to_none=True)
            free()
    for index in range(args.rounds):
        for case in list(running):
            if not attempt(rows[case.name], lambda case=case: case.turn(args.steps)):
                running.remove(case)
        if index and time.monotonic() > args.deadline:
            break
    for case in cases:
        case.optimizer.zero_grad(set_to_none=True)
    last = cases[-1]
    peer = statistics.median(last.times) if last in running else None
    for case in running:
        seconds = statistics.median(case.times)
        rows[case.name] |= dict(
            images_per_s=round(batch / seconds, 3),
            ms_per_step=round(seconds * 1e3, 1),
            spread=round((max(case.times) - min(case.times)) / seconds, 3),
            turns=len(case.times),
            ratio="" if peer is None else round(peer / seconds, 3),
            loss=round(float(case.loss), 3),
        )
    yield from rows.values()


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(row: dict) -> None:
    print(f"{row['config']} {row['precision']} x {row['batch']}:", end=" ")
    if row["note"]:
        print(row["note"], flush=True)
        return
    print(
        f"{row['images_per_s']} images/s, {row['ms_per_step']} ms (spread {row['spread']:.1%}), "
        f"ratio {row['ratio']}, peak {row['peak_GiB'] or '-'} GiB, loss {row['loss']}",
        flush=True,
    )


def setting(text: str) -> tuple[str, int]:
    precision, _, batch = text.partition(":")
    if precision not in TYPES or not batch.isdecimal() or int(batch) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give PRECISION:BATCH, with fp32, bf16 or fp16, as in bf16:2")
    return precision, int(batch)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="below configs/detection, or mmdet::PATH")
    parser.add_argument("--settings", nargs="+", type=setting, help=f"PRECISION:BATCH (default: {' '.join(SETTINGS)})")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=10, help="a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=200.0, help="no new setting and no third round after this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="CSV file; by default benchmarks/results/detection-DEVICE-torchX.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no GPU here; --device cpu runs, for a look only")
    args.settings = args.settings or [setting(text) for text in SETTINGS]
    args.deadline = time.monotonic() + args.seconds
    return args


def main() -> int:
    from mmengine.registry import init_default_scope

    args = arguments()
    init_default_scope("mmdet")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    version = torch.__version__.partition("+")[0]
    kernels = os.environ.get("VISIONATTN_KERNELS", "auto")
    about = dict(device=device, torch=version, mmdet=mmdet.__version__, kernels=kernels)
    default = f"detection-{device.lower().replace(' ', '-')}-torch{version}.csv"
    out = args.out or Path(__file__).with_name("results") / default
    print(f"{device}, torch {version}, mmdet {mmdet.__version__}; our kernels: {kernels}; {out}", flush=True)
    cases = [Case(name, args.device) for name in args.configs]
    failed = 0
    for precision, batch in args.settings:
        if time.monotonic() > args.deadline:
            print(f"{precision} x {batch}: left out, the time is up", flush=True)
            continue
        rows = [row | about for row in measure(cases, precision, batch, args)]
        append(out, rows)
        for row in rows:
            show(row)
            failed += row["note"] not in ("", "out of memory")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

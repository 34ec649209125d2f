"""Training throughput and peak memory of Mask R-CNN with different backbones, in turns within one run. No COCO needed.

    python benchmarks/detection.py                              # agent_swin_tiny, mala_tiny, mmdet's Swin-T; 800 x 1333
    python benchmarks/detection.py --batch 4 --configs agent_pvt/mask-rcnn_agent-pvt-t_fpn_1x_coco.py
    python benchmarks/detection.py --device cpu --size 96 128 --batch 1 --steps 1 --warmup 0   # whether it runs

Pictures, boxes and masks are random, weights too: the first proposals are what an untrained network proposes, the same
for all. A step is forward, losses, backward and the optimizer's step, under bfloat16 autocast on a GPU. Every model has
a turn in every round; times are medians over rounds, ratios are to the last config. The peak is that of a step with
this model alone in memory, before the rounds. Rows go to a CSV file with the device in its name.
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

import visionattn.detection  # noqa: F401  operators and registrations, before mmdet

CONFIGS = [
    "agent_swin/mask-rcnn_agent-swin-t_fpn_ms-crop-1x_coco.py",
    "mala/mask-rcnn_mala-t_fpn_amp-1x_coco.py",
    "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
]
FIELDS = [
    "config", "height", "width", "batch", "images_per_s", "ms_per_step", "spread", "peak_GiB", "Mparams", "ratio",
    "device", "torch",
]  # fmt: skip
FOLDER = Path(__file__).resolve().parents[1] / "configs" / "detection"


class Case:
    """One detector with its optimizer and one batch."""

    def __init__(self, name: str, args: argparse.Namespace):
        from mmdet.registry import MODELS
        from mmdet.testing import demo_mm_inputs
        from mmengine.config import Config
        from mmengine.hub import get_config
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import init_default_scope

        torch.manual_seed(0)
        cfg = get_config(name) if name.startswith("mmdet::") else Config.fromfile(FOLDER / name)
        init_default_scope("mmdet")
        self.name = name
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(args.device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.05)
        height, width = args.size
        self.data = demo_mm_inputs(
            args.batch, [[3, height, width]] * args.batch, num_items=[8] * args.batch, num_classes=80, with_mask=True
        )
        self.device = args.device
        self.params = sum(p.numel() for p in self.model.parameters())

    def step(self) -> None:
        data = self.model.data_preprocessor(self.data, True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            losses = self.model(**data, mode="loss")
        loss, _ = self.model.parse_losses(losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def timed(self, steps: int) -> float:
        """Seconds a step."""
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(self.device)
        return (time.perf_counter() - start) / steps


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(name: str, args: argparse.Namespace) -> float | None:
    """GiB at the most while one model takes a step alone; None on a CPU."""
    if args.device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    case = Case(name, args)
    for _ in range(2):  # the second has the optimizer's moments
        case.step()
    peak = torch.cuda.max_memory_allocated() / 2**30
    del case
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def measure(args: argparse.Namespace) -> list[dict]:
    peaks = {name: peak_of(name, args) for name in args.configs}
    cases = [Case(name, args) for name in args.configs]
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        for _ in range(args.warmup):
            case.step()
    for round_ in range(args.rounds):
        for case in cases:
            times[case.name].append(case.timed(args.steps))
        print(f"round {round_ + 1} of {args.rounds}", *(f"{t[-1] * 1e3:.0f} ms" for t in times.values()), flush=True)
    peer = statistics.median(times[args.configs[-1]])
    rows = []
    for case in cases:
        seconds = statistics.median(times[case.name])
        peak = peaks[case.name]
        rows.append(
            dict(
                config=case.name,
                height=args.size[0],
                width=args.size[1],
                batch=args.batch,
                images_per_s=round(args.batch / seconds, 2),
                ms_per_step=round(seconds * 1e3, 1),
                spread=round((max(times[case.name]) - min(times[case.name])) / seconds, 3),
                peak_GiB="" if peak is None else round(peak, 2),
                Mparams=round(case.params / 1e6, 2),
                ratio=round(peer / seconds, 3),
                device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                torch=torch.__version__.partition("+")[0],
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="below configs/detection, or mmdet::PATH")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="CSV file; by default benchmarks/results/detection-DEVICE-torchX.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no GPU here; --device cpu runs, for a look only")
    rows = measure(args)
    device = rows[0]["device"].lower().replace(" ", "-")
    default = Path(__file__).with_name("results") / f"detection-{device}-torch{rows[0]['torch']}.csv"
    out = args.out or default
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(out)
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in FIELDS))


if __name__ == "__main__":
    main()

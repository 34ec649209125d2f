"""All mechanisms in one host on the handwritten digits: best top-1 over seeds, by train.py and its digits recipe.

    python benchmarks/mechanisms.py                       # 4 mechanisms x 3 seeds, a table and a CSV file
    python benchmarks/mechanisms.py --jobs 6 --epochs 20

The host is a small DeiT (64 wide, 4 blocks, 4 heads) at 32 px with patches of 4 px; softmax is the host's own
attention. Rows go to a CSV file as they are known; runs that the file has are skipped.
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import visionattn

ROOT = Path(__file__).resolve().parents[1]
HOST = ["patch_size=4"]
MECHANISMS = {
    "softmax": ["agent_layer=0"],
    "agent": ["attn_layer=agent", "agent_num=9"],
    "inline": ["attn_layer=inline"],
    "mala": ["attn_layer=mala"],
}
FIELDS = ["mechanism", "seed", "epochs", "top1", "Mparams", "seconds", "device", "torch"]


def run(mechanism: str, seed: int, epochs: int, about: dict) -> dict:
    """Trains once; raises RuntimeError with the end of the output where train.py fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/train/digits.yaml", "--model", "test_inline_deit"]
        command += ["--model-kwargs", *HOST, *MECHANISMS[mechanism], "--epochs", str(epochs), "--seed", str(seed)]
        command += ["--output", folder, "--threads", "1"]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"best top1 ([\d.]+)", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"{mechanism}, seed {seed}: {(done.stdout + done.stderr)[-600:]}")
    millions = re.search(r"([\d.]+) M parameters", done.stdout)
    row = dict(mechanism=mechanism, seed=seed, epochs=epochs, top1=float(found[1]), Mparams=float(millions[1]))
    return dict(row, seconds=round(time.monotonic() - begin), **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", default=list(MECHANISMS), choices=list(MECHANISMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    version = torch.__version__.partition("+")[0]
    label = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = args.out or ROOT / "benchmarks" / "results" / f"mechanisms-digits-{label}-torch{version}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    known = {(row["mechanism"], int(row["seed"]), int(row["epochs"])) for row in rows}
    wanted = [(m, s, args.epochs) for s in args.seeds for m in args.mechanisms if (m, s, args.epochs) not in known]
    registered = visionattn.list_modules("mixer")
    wanted = [w for w in wanted if w[0] == "softmax" or w[0] in registered]
    with ThreadPoolExecutor(args.jobs) as pool, path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not rows:
            writer.writeheader()
        about = dict(device=device, torch=version)
        for row in pool.map(lambda w: run(*w, about), wanted):
            writer.writerow(row)
            file.flush()
            rows.append(row)
            print(f"{row['mechanism']:8} seed {row['seed']}: {row['top1']:.2f} % in {row['seconds']} s", flush=True)
    print("\n| attention | parameters, M | top-1, % (mean ± deviation) | seeds |\n|---|---|---|---|")
    for mechanism in args.mechanisms:
        of = [r for r in rows if r["mechanism"] == mechanism and int(r["epochs"]) == args.epochs]
        if of:
            scores = [float(r["top1"]) for r in of]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(
                f"| {mechanism} | {of[0]['Mparams']} | {statistics.mean(scores):.2f} ± {spread:.2f} | {len(scores)} |"
            )


if __name__ == "__main__":
    main()

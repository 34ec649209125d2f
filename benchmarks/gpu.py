"""Everything that needs a GPU, step by step within a time budget: tests first, then the figures that depend on them.

    python benchmarks/gpu.py --show                          # the steps, their minutes on an H100, their commands
    python benchmarks/gpu.py --minutes 9                     # as many as fit, in order
    python benchmarks/gpu.py --steps tests moh-operator --pack DIR

A step is a command of its own that anybody can run alone. Each gets twice its minutes, is ended then with what it
started, and the next one goes on. ``summary.csv`` gets a row as soon as a step ends; steps with exit status 0 there are
not run again, so the same command goes on where it stopped. ``log.txt`` has all output. ``--pack DIR`` also keeps a
results.tar there: the log, and what changed in benchmarks/results and of the histories in runs.
"""

import argparse
import csv
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = "python -m pytest -m gpu -o addopts= -p no:warnings --tb=short -v -rf --dist worksteal -n"
TESTS = " ".join(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*_gpu.py")))
# in one process: they share the card, and the recipe's end takes the same command twice. The paper's other seeds, and
# one net without positions, where the paper has 72.14 %: tells what eigenvectors do from what graphs and trainer do
CLUSTER = "python -m visionattn.training.graph --config configs/graph/cluster.yaml --max-seconds 540 " + " ".join(
    f"--run {options}" for options in ("seed=95", "seed=12", "seed=35", "net.lap_pos_enc=false")
)


@dataclass(frozen=True)
class Step:
    name: str
    minutes: float  # expected, on an H100
    command: str


STEPS = [
    # what 'auto' may take waits for these; 204 s with 16 processes on 16 cores
    Step("tests", 4, f"{PYTEST} 16 {TESTS} tests/models/test_hosts.py"),
    # operators
    Step("aggregated", 3, "python benchmarks/aggregated.py"),
    Step("local", 5.5, "python benchmarks/local_attention.py --seconds 300"),
    Step("moh-operator", 2, "python benchmarks/moh.py --parts operator"),
    Step("graph", 1, "python benchmarks/graph.py"),
    # networks
    Step("moh-networks", 4, "python benchmarks/moh.py --parts vit dit"),
    Step("backbones-train", 4, "python benchmarks/backbones.py --tasks train --rounds 3 --minutes 4"),
    Step("backbones-compile", 6, "python benchmarks/backbones.py --modes compile cudagraphs --rounds 3 --minutes 6 "
         "--workers 8"),
    Step("backbones-curves", 3, "python benchmarks/backbones.py --tasks infer --sizes 224 512 1024 --scale-batch "
         "--minutes 3 --models agent_swin_tiny inline_swin_tiny inline_swin_tiny@global mala_tiny nat_tiny"),
    Step("profile", 1.5, "python benchmarks/profile_model.py moh_vit_small_80 mala_tiny agent_swin_tiny"),
    Step("halo-compile", 3, "python benchmarks/halo.py --parts network --modes compile --models halo_h1 halo_h4"),
    Step("train-loop", 3, "python benchmarks/train_loop.py"),
    # diffusion
    Step("diffusion-tests", 2, f"{PYTEST} 2 tests/diffusion/test_distill.py tests/diffusion/test_parallel.py"),
    Step("flux-compile", 5, "python benchmarks/flux.py --compile --seconds 285"),
    Step("video", 2.5, "python benchmarks/video.py --seconds 140"),
    Step("distill-demo", 5, "python benchmarks/distill_demo.py --seconds 270"),
    Step("agent-sd", 2, "python benchmarks/agent_sd.py --budget 1 --seconds 100"),
    Step("parallel", 1, "python -m torch.distributed.run --nproc-per-node 2 benchmarks/parallel.py --seconds 55"),
    # detection
    Step("mmcv-tests", 1, f"{PYTEST} 2 tests/detection/test_mmcv_ops.py"),
    Step("detection", 4, "python benchmarks/detection.py"),
    Step("cluster", 9.5, CLUSTER),
]  # fmt: skip


def run(step: Step, log, minutes: float) -> tuple[int | None, str]:
    """Exit status (None: ended by time) and the last line that a step printed."""
    command = [sys.executable if word == "python" else word for word in shlex.split(step.command)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    begin = log.tell()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(timeout=minutes * 60)
    except BaseException as stop:  # also on Ctrl-C nothing of the step stays behind
        for sent in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, sent)
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
        status = None
    with open(log.name, errors="replace") as text:
        text.seek(begin)
        lines = text.read().split("\n")
    return status, next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def pack(folder: Path, since: float, log: Path) -> None:
    """results.tar of the log, the summary and the results that changed, under a temporary name first."""
    part = folder / ".results.tar.part"
    runs = [path for name in ("result.json", "history.*") for path in (ROOT / "runs").rglob(name)]
    with tarfile.open(part, "w") as tar:
        for path in (log, log.with_name("summary.csv"), *sorted(RESULTS.iterdir()), *runs):
            if path.is_file() and path.stat().st_mtime >= since:
                tar.add(path, path.name if path.parent == RESULTS else str(path.relative_to(path.parents[1])))
    part.replace(folder / "results.tar")


def main() -> int:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help="these, in this order")
    parser.add_argument("--minutes", type=float, default=600.0, help="no step runs longer than this in all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for log.txt and summary.csv")
    parser.add_argument("--pack", type=Path, help="folder for results.tar")
    parser.add_argument("--show", action="store_true", help="print the steps and stop")
    args = parser.parse_args()
    steps = {step.name: step for step in STEPS}
    if args.show:
        print("\n".join(f"{step.name:20}{step.minutes:5.1f} min  {step.command}" for step in STEPS))
        return 0
    began = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pack:
        args.pack.mkdir(parents=True, exist_ok=True)
    summary = args.out / "summary.csv"
    done = set()
    if summary.exists():
        with summary.open(newline="") as file:
            done = {row[0] for row in csv.reader(file) if row[1] == "0"}
    failed = 0
    with summary.open("a", newline="") as rows, (args.out / "log.txt").open("a") as log:
        for name in args.steps:
            left = args.minutes - (time.time() - began) / 60
            if name in done or left < 0.5 * steps[name].minutes:
                print(f"{name}: {'done before' if name in done else f'not begun, {max(left, 0):.1f} minutes are left'}")
                continue
            log.write(f"\n=== {name}: {steps[name].command}\n")
            log.flush()
            log.seek(0, os.SEEK_END)
            start = time.time()
            status, last = run(steps[name], log, min(left, 2 * steps[name].minutes))
            seconds = f"{time.time() - start:.0f}"
            csv.writer(rows).writerow([name, "time" if status is None else status, seconds, last])
            rows.flush()
            failed += status != 0
            print(f"{name}: {'ended by time' if status is None else f'exit {status}'}, {seconds} s. {last}", flush=True)
            if args.pack:
                pack(args.pack, began, args.out / "log.txt")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())

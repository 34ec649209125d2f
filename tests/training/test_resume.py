"""Resume is exact, and no kill loses the run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .conftest import ROOT, TINY, differences, only_run, state_of

FULL = (
    f"{TINY} --epochs 2 --ema --ema-warmup --drop 0.3 --mixup 0.4 --cutmix 0.5 --smoothing 0.1 --color-jitter 0.3 "
    "--auto-augment rand-m5-inc1 --random-erasing 0.4 --clip-grad 1 --warmup-epochs 1 --weight-decay 0.05"
)
CASES = {
    "adamw mid-epoch": ("", 4),
    "end of epoch": ("", 6),
    "accumulation with a short tail": ("--grad-accum 4", 3),
    "workers": ("--workers 2", 3),
    "bf16": ("--amp bf16", 2),
    "fp16 with its scaler": ("--amp fp16 --opt sgd", 5),
    "repeated augmentation, lookahead": ("--aug-repeats 2 --opt lookahead_adam", 8),
    "layer decay, wsd": ("--layer-decay 0.7 --sched wsd --opt lamb", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case, train, pictures, tmp_path):
    """2N updates in one go equal N, a stop, and the rest, bit for bit: weights, EMA, optimizer, scaler, randomness."""
    more, stop = CASES[case]
    args = f"{FULL} {more} --data-dir {pictures}"
    assert train(args, output=tmp_path / "whole")[0] == 0
    status, out, _ = train(f"{args} --stop-step {stop}", output=tmp_path / "parts")
    run = only_run(tmp_path / "parts")
    assert status == 0 and f"--resume {run}" in out
    half = state_of(run)
    assert half["position"]["step"] == stop
    assert train(f"--resume {run}")[0] == 0
    whole, parts = state_of(only_run(tmp_path / "whole")), state_of(run)
    assert differences(whole, half), "the comparison sees nothing: the halved run equals the whole one"
    assert differences(whole, parts) == []
    # the summary has each epoch once, and the same figures in all but the clock's columns
    rows = [(r / "summary.csv").read_text().splitlines() for r in (run, only_run(tmp_path / "whole"))]
    assert len(rows[0]) == 3 and [x.split(",")[:5] for x in rows[0]] == [x.split(",")[:5] for x in rows[1]]


def test_workers_do_not_change_the_run(train, pictures, tmp_path):
    """An image's augmentation depends on its place in the epoch alone, not on the process that does it."""
    for n in (0, 2):
        train(f"{FULL} --workers {n} --data-dir {pictures}", output=tmp_path / str(n))
    assert differences(state_of(only_run(tmp_path / "0")), state_of(only_run(tmp_path / "2"))) == []


def test_resume_of_a_finished_run_does_nothing(train, tmp_path):
    args = f"{TINY} --dataset synthetic --synthetic-images 16 --num-classes 4 --epochs 1"
    train(args)
    run = only_run(tmp_path / "runs")
    before = (run / "last.state.pt").stat().st_mtime_ns
    status, out, _ = train(f"{args} --resume auto")
    assert status == 0 and "complete" in out
    assert (run / "last.state.pt").stat().st_mtime_ns == before
    # more epochs make it unfinished again
    assert train("--epochs 2", "--resume", run)[0] == 0
    assert state_of(run)["position"]["epoch"] == 2


def test_auto_starts_where_nothing_is_and_takes_the_newest(train, tmp_path):
    args = f"{TINY} --dataset synthetic --synthetic-images 32 --num-classes 4 --epochs 1 --resume auto"
    assert "starting one" in train(f"{args} --stop-step 1")[1]
    run = only_run(tmp_path / "runs")
    status, _, _ = train(args)
    assert status == 0 and only_run(tmp_path / "runs") == run and state_of(run)["position"]["epoch"] == 1


def test_another_batch_size_resumes_at_the_same_images(train, pictures, tmp_path):
    args = f"{TINY} --data-dir {pictures} --epochs 1"
    train(f"{args} --stop-step 4")
    run = only_run(tmp_path / "runs")
    status, out, _ = train("--batch-size 16", "--resume", run)
    assert status == 0 and "not bit for bit" in out and "batch_size" in out
    assert state_of(run)["position"]["step"] == 3  # 48 images / 16: two of the three batches had been seen as four


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from visionattn.training import cli, engine
run, seed, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = os.path.join(run, "last.state.pt")
random.seed(seed)
steps, died, scale = [], 0, 1.0
while died < kills:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main(["--resume", run]))
    time.sleep(scale * (0.15 + random.random() * 0.7))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    died += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status) and status:
        sys.exit("a resume failed")
    s = torch.load(state, weights_only=True)  # whole at any moment
    from safetensors.torch import load_file
    load_file(os.path.join(run, "last.safetensors"))
    steps.append(s["position"]["step"])
    if s["position"]["epoch"] >= 12:
        break
    # a fast machine would be through before it was killed often enough
    scale = max(0.1, 0.7 * scale) if s["position"]["epoch"] > 12 * died / kills else min(1.0, 1.3 * scale)
print(died, len(set(steps)), steps == sorted(steps))
"""


def test_kill_9_at_random_moments(train, tmp_path):
    """At least 20 kills: every time a whole checkpoint is there and the run goes on, to the end of an unbroken run."""
    args = (
        f"{TINY} --dataset synthetic --synthetic-images 64 --num-classes 4 --img-size 24 --epochs 12 --save-interval 1 "
        "--drop 0.2 --ema"
    )
    assert train(f"{args} --stop-step 1")[0] == 0
    run = only_run(tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), "0", "22"], capture_output=True, text=True, cwd=ROOT, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    died, distinct, in_order = done.stdout.split()[-3:]
    assert int(died) >= 20 and int(distinct) >= 3 and in_order == "True", done.stdout
    leftovers = [p.name for p in run.iterdir() if p.name.endswith(".tmp")]
    assert len(leftovers) <= 6, leftovers  # temporary names are reused, not piled up
    assert train(f"--resume {run}")[0] == 0
    assert train(args, output=tmp_path / "whole")[0] == 0
    assert differences(state_of(only_run(tmp_path / "whole")), state_of(run)) == []


def start(arguments: str, output: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", *arguments.split(), "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_cleanly(number, pictures, tmp_path):
    """In the middle of an epoch, with worker processes, the signal going to the whole group as a scheduler sends it."""
    args = f"{TINY} --epochs 500 --log-interval 1 --workers 1 --data-dir {pictures}"
    command = [sys.executable, "train.py", *args.split(), "--output", str(tmp_path)]
    p = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         start_new_session=True)  # fmt: skip
    wait_for(p, "update 3")
    time.sleep(random.random() * 0.2)
    os.killpg(p.pid, number)
    rest = p.communicate(timeout=60)[0]
    assert p.returncode == 0, rest
    run = only_run(tmp_path)
    assert f"--resume {run}" in rest and "Traceback" not in rest
    assert state_of(run)["position"]["step"] >= 3


def test_a_run_folder_has_one_owner(train, tmp_path, pictures):
    args = f"{TINY} --epochs 500 --log-interval 1 --save-interval 1 --data-dir {pictures}"
    p = start(args, tmp_path / "runs")
    wait_for(p, "update 3")
    run = only_run(tmp_path / "runs")
    status, _, err = train(f"--resume {run}")
    p.kill()
    p.wait()
    assert status == 2 and "in use by another process" in err and err.count("\n") == 1
    status, _, err = train(f"--resume {run} --stop-step {state_of(run)['position']['step'] + 1}")  # free again
    assert status == 0, err


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    from visionattn.training.checkpoint import make_run_folder

    names = {make_run_folder(str(tmp_path), "m", "20260101-000000") for _ in range(3)}
    assert len(names) == 3 and all(n.is_dir() for n in names)


def test_weights_file_says_what_it_is(train, pictures, tmp_path):
    from safetensors import safe_open

    train(f"{TINY} --epochs 1 --ema --data-dir {pictures}")
    run = only_run(tmp_path / "runs")
    state = state_of(run)
    with safe_open(run / "last.safetensors", framework="pt") as f:
        about = json.loads(f.metadata()["visionattn"])
        weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert about["num_classes"] == 3 and about["data"]["input_size"] == [3, 32, 32] and about["ema"] is True
    assert differences(weights, dict(state["ema"])) == [] and differences(weights, dict(state["model"]))
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "summary.csv", "curves.png", "best.safetensors",
                                               "best.state.pt", "last.safetensors"}  # fmt: skip
    assert isinstance(state["optimizer"]["state"][0]["exp_avg"], torch.Tensor)

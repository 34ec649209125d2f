"""Two processes and gloo: the same run as one process with twice the batch, lost ranks, sharding."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ROOT, differences, make_pictures, only_run, state_of

# no BatchNorm and no dropout, and an optimizer that does not magnify rounding: sums over images are sums over images
PLAIN = (
    "--model test_vit --model-kwargs img_size=32 --img-size 32 --workers 0 --seed 1 --device cpu --threads 1 "
    "--opt momentum --lr 0.05 --epochs 2 --log-interval 2 --ema --ema-decay 0.9 --clip-grad 1"
)

# Imports once, then runs each command line with as many forked ranks as it asks for, as torchrun would start them.
LAUNCH = """
import os, shlex, sys
import torch
torch.set_num_threads(1)
from visionattn.training import cli, engine, distributed
for port, command in zip(sys.argv[1].split(","), sys.argv[2:], strict=True):
    size, arguments = command.split(" ", 1)
    ranks = []
    for rank in range(int(size)):
        pid = os.fork()
        if pid == 0:
            if int(size) > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=port)
            status = 70
            try:
                status = cli.main(shlex.split(arguments))
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(status)
        ranks.append(pid)
    print("statuses", [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in ranks], flush=True)
"""


def free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(*commands: str, timeout: int = 240) -> str:
    """Run the commands ('<ranks> <arguments>') one after the other; all their output."""
    ports = ",".join(free_ports(len(commands)))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, ports, *commands], capture_output=True, text=True, cwd=ROOT, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> tuple[Path, str]:
    """The runs that the tests below compare, and what they printed."""
    root = tmp_path_factory.mktemp("runs")
    data = f"--data-dir {pictures} --output {root}"
    base, half = f"{PLAIN} {data}", "--batch-size 4"
    text = launch(
        f"1 {base}/one --batch-size 8",
        f"2 {base}/two {half}",
        f"2 {base}/two_accum --batch-size 2 --grad-accum 2",
        f"2 {base}/fsdp {half} --fsdp --opt adamw --lr 1e-3",
        f"2 {base}/fsdp_stop {half} --fsdp --opt adamw --lr 1e-3 --stop-step 4",
        f"2 {base}/ddp_adamw {half} --opt adamw --lr 1e-3",
        f"2 {base}/stop {half} --stop-step 4",
        f"2 --model test_resnot {data}/error",
    )
    shutil.copytree(root / "stop", root / "stop_copy")
    text += launch(
        f"2 --resume {only_run(root / 'fsdp_stop')}",
        f"2 --resume {only_run(root / 'stop')}",
        f"2 --model test_resnet --img-size 32 --workers 0 --device cpu {data}/bn {half} --epochs 1",
    )
    return root, text


def weights(root: Path, name: str, part: str = "model") -> dict[str, torch.Tensor]:
    return state_of(only_run(root / name))[part]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    assert list(a) == list(b)
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def test_two_processes_equal_one_with_twice_the_batch(runs):
    root, text = runs
    assert text.count("statuses [0, 0]") == 9 and text.count("statuses [0]") == 1, text
    for name in ("two", "two_accum"):
        for part in ("model", "ema"):
            assert distance(weights(root, "one", part), weights(root, name, part)) < 2e-6
    start = weights(root, "stop")
    assert distance(start, weights(root, "two")) == 0  # it was resumed to the end: exactly the unbroken run
    assert (
        distance(weights(root, "two"), weights(root, "stop_copy")) > 1e-4
    )  # the comparison sees a run that is not finished
    histories = [state_of(only_run(root / n))["history"] for n in ("one", "two", "two_accum")]
    losses = [[row["train_loss"] for row in h] for h in histories]
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)
    evaluations = [[row["eval_loss"] for row in state_of(only_run(root / n))["history"]] for n in ("one", "two")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_only_the_first_rank_writes_and_prints(runs):
    root, text = runs
    for folder in root.iterdir():
        only_run(folder)
    assert text.count("epoch 0 done") == 8  # once a run that got there, not once a rank


def test_an_error_of_all_ranks_is_one_line(runs):
    _, text = runs
    assert "statuses [2, 2]" in text and "Traceback" not in text
    assert text.count("model='test_resnot' is unknown. Did you mean 'test_resnet'?") == 1


def test_sharded_run_is_the_copied_one(runs):
    """FSDP2: the same numbers as DDP, whole tensors in the checkpoint, and an exact resume."""
    root, _ = runs
    assert distance(weights(root, "fsdp"), weights(root, "ddp_adamw")) < 1e-5
    assert distance(weights(root, "fsdp", "ema"), weights(root, "ddp_adamw", "ema")) < 1e-5
    whole, parts = (state_of(only_run(root / n)) for n in ("fsdp", "fsdp_stop"))
    assert differences(whole, parts) == []
    assert whole["optimizer"]["state"][0]["exp_avg"].shape == next(iter(weights(root, "ddp_adamw").values())).shape


def start(tmp_path: Path, arguments: str, ranks: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
               free_ports(1)[0], "train.py", *arguments.split(), "--output", str(tmp_path)]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process has started, by rank (they start in that order)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(p) for p in listed if "train.py" in Path(f"/proc/{p}/cmdline").read_text())


def wait_for(process: subprocess.Popen, word: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"{word!r} never came:\n{seen}")


ENDLESS = PLAIN.replace("--epochs 2", "--epochs 5000") + " --batch-size 4 --save-interval 2"


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_job_with_a_message(victim, tmp_path):
    data = make_pictures(tmp_path / "data", train=8, val=2)
    p = start(tmp_path / "runs", f"{ENDLESS} --data-dir {data}")
    wait_for(p, "update 4")
    began = time.monotonic()
    os.kill(children(p.pid)[victim], signal.SIGKILL)
    rest = p.communicate(timeout=100)[0]
    assert p.returncode != 0 and time.monotonic() - began < 90
    message = [line for line in rest.splitlines() if "train.py: error:" in line]
    assert len(message) == 1 and "lost contact with another rank" in message[0], rest
    run = only_run(tmp_path / "runs")
    step = state_of(run)["position"]["step"]
    assert step >= 2 and f"rank {1 - victim} of 2" in message[0]
    if victim == 1:  # the survivor is the one that writes: it knows what is saved
        assert f"Update {step} is saved" in message[0] and f"--resume {run}" in message[0]


def test_sigterm_to_the_job_saves_and_ends_it(tmp_path):
    data = make_pictures(tmp_path / "data", train=8, val=2)
    p = start(tmp_path / "runs", f"{ENDLESS} --data-dir {data} --save-interval 0")
    wait_for(p, "update 4")
    for child in children(p.pid)[:1]:  # one rank's signal is enough for all
        os.kill(child, signal.SIGTERM)
    rest = p.communicate(timeout=100)[0]
    assert p.returncode == 0 and "stopped and saved at update" in rest and "Traceback" not in rest, rest
    step = int(rest.split("stopped and saved at update ")[1].split()[0])
    assert state_of(only_run(tmp_path / "runs"))["position"]["step"] == step

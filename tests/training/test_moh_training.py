"""train.py on models with routed heads: their load-balance loss, and dense models that go on as MoH ones."""

import csv
import subprocess
import sys

import pytest
import torch

from tests.training.conftest import ROOT, only_run, state_of
from tests.training.test_distributed import LAUNCH, free_ports
from visionattn._world import World
from visionattn.layers.moh import MoHAttention
from visionattn.training import config
from visionattn.training.engine import Trainer

COMMON = "--dataset synthetic --synthetic-images 16 --num-classes 4 --batch-size 8 --workers 0 --seed 1 --epochs 1"
VIT = f"--model test_vit --model-kwargs img_size=32 --img-size 32 --moh-active 0.5 {COMMON}"
MOH_VIT = f"--model test_moh_vit --img-size 64 {COMMON}"


def trainer(arguments: str) -> Trainer:
    torch.set_num_threads(1)
    cfg, _ = config.parse(arguments.split())
    return Trainer(cfg, World(torch.device("cpu")))


@pytest.mark.parametrize("more", ["", "--grad-checkpointing --ema"])
def test_loss_has_the_load_balance(more):
    """A batch's loss with it and without: the difference is 0.01 times the mean of the layers' terms, at least k."""
    losses = []
    for weight in (0.0, 1.0, 2.0):
        t = trainer(f"{MOH_VIT} {more} --lr 0 --aux-weight {weight}")
        x, y = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
        t.task.train()
        t._batch(x, y, 1, True)
        losses.append(t.losses[-1][1].item())
    routed = [m.routed_head for m in t.model.modules() if getattr(m, "routed_head", 0) > 0]
    extra = losses[1] - losses[0]
    assert extra == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-3)
    assert extra == pytest.approx(0.01 * sum(routed) / len(routed), rel=0.3)


def test_a_dense_model_goes_on(train, tmp_path, pictures):
    """The weights know that heads are routed: evaluated alone they give the figure of the run."""
    data = f"--data-dir {pictures} --workers 0"
    arguments = f"--model test_vit --model-kwargs img_size=32 --img-size 32 --batch-size 8 --epochs 1 --seed 1 {data}"
    status, _, err = train(f"{arguments} --moh-active 0.5")
    assert status == 0, err
    run = only_run(tmp_path / "runs")
    top1 = float(list(csv.DictReader((run / "summary.csv").open()))[-1]["eval_top1"])
    status, out, err = train(f"--validate test_vit --checkpoint {run / 'last.safetensors'} {data}")
    assert status == 0 and f"top1 {top1:.3f}" in out, (out, err)


def test_moh_active_is_what_to_moh_does():
    t = trainer(VIT)
    layers = [m for m in t.model.modules() if isinstance(m, MoHAttention)]
    assert layers and all(layer.active <= 0.5 for layer in layers)


def test_refuses_other_models(train):
    status, _, err = train(f"--model test_resnet --img-size 32 --moh-active 0.5 {COMMON}")
    assert status != 0 and "moh_active=0.5" in err and "Traceback" not in err


@pytest.mark.parametrize("how", ["", "--fsdp"])
def test_two_ranks(how, tmp_path):
    """Every parameter is reached on every rank, and the routed layers' own loss changes what is learned."""
    weights = []
    for weight in (0.0, 50.0):
        out = tmp_path / f"runs{weight}"
        arguments = f"2 {MOH_VIT} {how} --device cpu --threads 1 --aux-weight {weight} --output {out}"
        command = [sys.executable, "-c", LAUNCH, free_ports(1)[0], arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "statuses [0, 0]" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
        weights.append(state_of(only_run(out))["model"])
    name = next(n for n in weights[0] if n.endswith("wg.weight"))
    assert not torch.equal(weights[0][name], weights[1][name])

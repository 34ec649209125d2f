"""Every option trains, and changes what it says it changes."""

import csv
import subprocess
import sys
import tarfile

import pytest
import torch
import yaml
from safetensors.torch import load_file

from visionattn.training import build, config
from visionattn.training.config import Config

from .conftest import ROOT, TINY, make_pictures, only_run, state_of

SHORT = f"{TINY} --epochs 1"


def ran(train, arguments, output):
    status, out, err = train(arguments, output=output)
    assert status == 0, err
    return only_run(output), out


OPTIONS = {
    "bf16": "--amp bf16",
    "fp16": "--amp fp16",
    "channels-last": "--channels-last",
    "compile": "--compile",
    "accumulation": "--grad-accum 2",
    "clipping": "--clip-grad 0.01",
    "adaptive clipping": "--clip-grad 0.01 --clip-mode agc",
    "layer decay": "--layer-decay 0.5",
    "label smoothing": "--smoothing 0.1",
    "bce": "--loss bce --mixup 0.5 --bce-target-thresh 0.2",
    "mixup by element": "--mixup 0.8 --cutmix 1.0 --mixup-mode elem",
    "random erasing": "--random-erasing 0.9",
    "augmix-like policies": "--auto-augment rand-m9-mstd0.5-inc1",
    "repeated augmentation": "--aug-repeats 3",
    "drop path": "--drop-path 0.4",
    "padded crop": "--crop-mode pad",
    "lion": "--opt lion --lr 1e-4",
    "plateau-free schedule": "--sched step --sched-kwargs decay_epochs=1 decay_rate=0.5",
    "logit distillation": "--teacher test_resnet",
    "feature distillation": "--teacher test_resnet --distill feature",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pictures):
    """The weights after an epoch without any option."""
    from visionattn.training.cli import main

    output = tmp_path_factory.mktemp("plain")
    assert main([*f"{SHORT} --data-dir {pictures} --output {output}".split()]) == 0
    return load_file(only_run(output) / "last.safetensors")


@pytest.mark.parametrize("name", OPTIONS)
def test_option_trains_and_has_an_effect(name, train, pictures, plain, tmp_path):
    run, _ = ran(train, f"{SHORT} --data-dir {pictures} {OPTIONS[name]}", tmp_path / "run")
    weights = load_file(run / "last.safetensors")
    assert weights.keys() == plain.keys()
    assert all(w.isfinite().all() for w in weights.values())
    same = all(torch.equal(w, plain[k]) for k, w in weights.items())
    if name not in ("channels-last", "compile", "augmix-like policies"):
        assert not same, "the option changed nothing"
    torch._dynamo.reset()


def test_accumulation_is_a_larger_batch(train, pictures, tmp_path):
    """SGD without batch norm's batch statistics would be equal to rounding; here the loss of the sum is compared."""
    args = f"--model test_vit --img-size 32 --workers 0 --seed 1 --epochs 1 --opt sgd --lr 0.05 --data-dir {pictures}"
    a, _ = ran(train, f"{args} --batch-size 16", tmp_path / "a")
    b, _ = ran(train, f"{args} --batch-size 8 --grad-accum 2", tmp_path / "b")
    a, b = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_ema_is_the_average(train, pictures, tmp_path):
    args = f"{SHORT} --data-dir {pictures} --ema --ema-decay 0.5 --save-interval 1"
    run, out = ran(train, args, tmp_path / "run")
    state = state_of(run)
    assert "ema loss" in out
    assert any(not torch.equal(state["model"][k], state["ema"][k]) for k in state["model"])
    assert torch.equal(load_file(run / "last.safetensors")["fc.weight"], state["ema"]["fc.weight"])


def test_layer_decay_scales_the_learning_rate():
    cfg = Config(model="test_vit", opt="adamw", lr=1.0, layer_decay=0.5)
    model = build.build_model(cfg, "test_vit", 3, {})
    scales = {g.get("lr_scale", 1.0) for g in build.build_optimizer(cfg, model).param_groups}
    assert max(scales) == 1.0 and min(scales) < 0.1


def test_auxiliary_losses_are_added(train, pictures, tmp_path, monkeypatch):
    import timm

    seen = []

    def with_loss(*args, original=timm.create_model, **kwargs):
        model = original(*args, **kwargs)

        def pop_aux_loss():
            seen.append(1)
            return model.fc.weight.square().sum()

        model.pop_aux_loss = pop_aux_loss
        return model

    plain, _ = ran(train, f"{SHORT} --data-dir {pictures} --opt sgd --lr 0.1", tmp_path / "plain")
    monkeypatch.setattr(timm, "create_model", with_loss)
    args = f"{SHORT} --data-dir {pictures} --opt sgd --lr 0.1 --aux-weight 2"
    run, _ = ran(train, args, tmp_path / "run")
    assert len(seen) == 6
    small, large = (load_file(r / "last.safetensors")["fc.weight"].norm() for r in (run, plain))
    assert small < 0.9 * large


def test_tar_archives(train, pictures, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for file in sorted((pictures / split).rglob("*.png")):
                tar.add(file, arcname=str(file.relative_to(pictures / split)))
    a, _ = ran(train, f"{SHORT} --data-dir {root}", tmp_path / "a")
    rows = list(csv.DictReader((a / "summary.csv").open()))
    assert len(rows) == 1 and float(rows[0]["eval_top1"]) >= 0


def test_tensorboard(train, pictures, tmp_path):
    pytest.importorskip("tensorboard")
    run, _ = ran(train, f"{SHORT} --data-dir {pictures} --tensorboard", tmp_path / "run")
    assert list(run.glob("events.out.tfevents.*"))


def test_validate_with_the_models_own_transform(train, pictures, tmp_path):
    run, _ = ran(train, f"{SHORT} --data-dir {pictures} --lr 3e-3 --epochs 4", tmp_path / "run")
    best = max(float(r["eval_top1"]) for r in csv.DictReader((run / "summary.csv").open()))
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = train(
        f"--validate test_resnet --checkpoint {run}/best.safetensors --data-dir {pictures} --workers 0",
        output=tmp_path / "none",
    )
    assert status == 0, err
    assert "top1" in out and "on 12 images, 32x32 px" in out
    assert float(out.split("top1 ")[1].split()[0]) == pytest.approx(best, abs=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    # a batch size that splits the set otherwise gives the same figures
    _, again, _ = train(
        f"--validate test_resnet --checkpoint {run}/best.safetensors --data-dir {pictures} --workers 0 --batch-size 5",
        output=tmp_path / "none",
    )
    assert again.split("top1")[1] == out.split("top1")[1]


def test_config_repeats_the_run(train, pictures, tmp_path):
    first, _ = ran(train, f"{SHORT} --data-dir {pictures} --mixup 0.3 --opt-kwargs eps=1e-6", tmp_path / "a")
    second, _ = ran(train, f"--config {first}/config.yaml", tmp_path / "b")
    a, b = load_file(first / "last.safetensors"), load_file(second / "last.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_command_line_goes_before_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: test_ela\nlr: 1e-2\nepochs: 7\ndataset: digits\n")
    cfg, _ = config.parse(["--config", str(path), "--lr", "0.5"])
    assert (cfg.lr, cfg.epochs, cfg.model) == (0.5, 7, "test_ela")


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "configs" / "train").glob("*.yaml")))
def test_recipes_are_buildable(recipe):
    """Each shipped recipe parses, names a registered model and builds its optimizer and schedule."""
    path = ROOT / "configs" / "train" / recipe
    assert path.read_text().startswith("#"), "a recipe says where it is from"
    cfg, _ = config.parse(["--config", str(path), "--data-dir", "."])
    build.check_model_name(cfg.model)
    with torch.device("meta"):
        model = build.build_model(cfg, cfg.model, cfg.num_classes or 1000, {})
    optimizer = build.build_optimizer(cfg, model)
    schedule, epochs = build.build_schedule(cfg, optimizer, 10)
    assert epochs >= cfg.epochs and optimizer.param_groups
    assert yaml.safe_load(path.read_text())["model"] == cfg.model and schedule is not None


def test_the_manual_lists_every_option():
    manual = (ROOT / "docs" / "training.md").read_text()
    assert config.options_table() in manual, "run: python -m visionattn.training.config, and paste its table"


def test_help():
    done = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--layer-decay" in done.stdout


def test_same_pictures_make_the_same_folder(tmp_path):
    a, b = make_pictures(tmp_path / "a", train=2, val=1), make_pictures(tmp_path / "b", train=2, val=1)
    files = sorted(p.relative_to(a) for p in a.rglob("*.png"))
    assert len(files) == 9 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)

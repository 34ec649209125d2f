"""Every recipe that ships: valid, of a model and an optimizer that build, with its source in the header."""

import pickle

import numpy as np
import pytest
import timm

from tests.training.conftest import ROOT, only_run, state_of
from visionattn.training import build, config, data

RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_builds(path):
    """Keys and values, model, transform, criterion, optimizer, schedule; not the data."""
    values = config.read_yaml(path)
    cfg = config.make({"data_dir": "/data", **values})
    assert path.read_text().startswith("# ")
    assert config.find_config(path.stem) == path  # --config <name> finds it
    model = build.build_model(cfg, cfg.model, cfg.num_classes, {})
    size = build.data_config(cfg, model, {}, False)
    assert size["input_size"][0] in (1, 3)
    data._train_transform(cfg, size)
    task = build.build_task(cfg, model, next(model.parameters()).device)
    optimizer = build.build_optimizer(cfg, task.trainable_module)
    updates = 1000
    schedule, epochs = build.build_schedule(cfg, optimizer, updates)
    schedule.step_update(int(cfg.warmup_epochs * updates))
    rate = max(g["lr"] for g in optimizer.param_groups)
    assert epochs >= cfg.epochs and 0.8 * cfg.lr <= rate <= 1.001 * cfg.lr  # the peak, right after the warm-up
    assert len({id(p) for g in optimizer.param_groups for p in g["params"]}) == len(list(model.parameters()))


def test_recipes_of_the_convolutional_half():
    assert {"digits", "imagenet", "ela_mobilenetv2", "ninformer_cifar10", "ninformer_cifar100"} <= {
        p.stem for p in RECIPES
    }


def test_ninformers_recipe_has_the_papers_optimizer():
    cfg = config.make(config.read_yaml(config.find_config("ninformer_cifar10")))
    model = timm.create_model(cfg.model, num_classes=10)
    optimizer = build.build_optimizer(cfg, model)
    assert type(optimizer).__name__ == "Adam" and {g["weight_decay"] for g in optimizer.param_groups} == {0}
    schedule, epochs = build.build_schedule(cfg, optimizer, 390)
    for step in (0, 1, 390 * 50, 390 * 100):
        schedule.step_update(step)
        assert {g["lr"] for g in optimizer.param_groups} == {1e-3}
    assert epochs == 100


def test_torchvisions_data_sets_by_timms_name(train, tmp_path, monkeypatch):
    """The CIFAR recipe over a small data set in CIFAR's own format."""
    import torchvision

    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    args = f"--config ninformer_cifar10 --data-dir {tmp_path / 'cifar'} --epochs 1 --batch-size 4 --workers 0"
    status, out, err = train(f"{args} --threads 1 --model-kwargs depth=1")
    assert status == 0, err
    assert "10 classes, 5 batches of 4" in out and "input 3x32x32" in out
    assert state_of(only_run(tmp_path / "runs"))["about"]["data"]["mean"] == (0.5, 0.5, 0.5)

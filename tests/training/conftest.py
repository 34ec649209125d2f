"""Helpers of the training tests: a folder of small pictures, and train.py called in this process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores, several test processes

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.training.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = "--model test_resnet --img-size 32 --batch-size 8 --workers 0 --log-interval 2 --seed 1"


def make_pictures(root: Path, classes: int = 3, train: int = 16, val: int = 4, size: int = 24) -> Path:
    """root/{train,val}/{a,b,c}/*.png: noise whose mean tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            folder = root / split / "abcdefgh"[c]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 96, (size, size, 3)) + 75 * c
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def train(tmp_path, capsys):
    """train('--epochs 1 ..') -> (status, standard output, standard error); runs go to tmp_path/runs."""
    torch.set_num_threads(1)

    def call(arguments: str, *more: str, output: Path | None = None):
        status = main([*shlex.split(arguments), *map(str, more), "--output", str(output or tmp_path / "runs")])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def only_run(folder: Path) -> Path:
    """The one run folder below."""
    (run,) = [p for p in folder.iterdir() if p.is_dir()]
    return run


def state_of(run: Path, name: str = "last") -> dict:
    return torch.load(run / f"{name}.state.pt", weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Paths at which two states differ, bit for bit; wall-clock columns are left out."""
    if path.endswith((".images_per_second", ".seconds")):
        return []
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        missing = [f"{path}.{k}" for k in set(a) ^ set(b)]
        return missing + [d for k in a if k in b for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]

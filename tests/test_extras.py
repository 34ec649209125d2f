"""A test that skips for a missing package fails where the extras have to be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SKIPPING = """
import pytest
from tests.extras import require_extra

def test_extra():
    require_extra("no_such_package", "natten")

def test_importorskip():
    pytest.importorskip("no_such_package")

def test_other_reason():
    pytest.skip("the moon is full")

@pytest.mark.gpu
def test_gpu():
    import torch
    assert torch.cuda.is_available()
"""


@pytest.mark.parametrize("required", ["0", "1"])
def test_skips(tmp_path, required):
    # the file lies under a conftest that imports ours, so the real hooks are at work
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(ROOT), "VISIONATTN_REQUIRE_EXTRAS": required, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = "2 failed, 2 skipped" if required == "1" else "4 skipped"
    assert expected in run.stdout, run.stdout + run.stderr
    assert "needs a CUDA GPU" in run.stdout
    if required == "1":
        assert "'no_such_package' is missing" in run.stdout

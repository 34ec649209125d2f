"""Kernels in Triton's interpreter: how the files ``interpreted_*.py`` begin, and how tests run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def need_interpreter() -> None:
    """Skips the file that calls this, except where :func:`interpret` runs it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)


@pytest.fixture(autouse=True)
def uninitialised_is_nan():
    """torch.empty gives NaN: an output or workspace that a kernel did not write shows. For files that import it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def interpret(*files: Path, only: str | None = None, skips: bool = False) -> None:
    """Runs test files in a process where Triton is an interpreter; all pass, and none is skipped without ``skips``.

    Args:
        only: the expression after pytest's ``-k``.
    """
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-k", only] if only else []
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, files)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and (skips or "skipped" not in done.stdout), done.stdout[-2000:]

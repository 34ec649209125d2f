"""What travels in the wheel. CI also installs one and runs tests against it, outside the checkout (.ci/run)."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import visionattn
from tests.extras import require_extra

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    if not (ROOT / "pyproject.toml").is_file() or Path(visionattn.__file__).parents[1] != ROOT:
        pytest.skip("runs against an installed wheel: there is no checkout to build one from")
    require_extra("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if run.returncode and "hatchling" in run.stderr + run.stdout and os.environ.get("VISIONATTN_REQUIRE_EXTRAS") != "1":
        pytest.skip("needs the package registry for the build backend")
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def tracked(folder: str) -> set[str]:
    run = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout: there is nothing to compare the wheel with")
    return set(run.stdout.split())


@pytest.mark.slow
def test_contents(wheel):
    """Everything under version control in these folders, and no more than the working tree has."""
    names = set(wheel.namelist())
    assert tracked("visionattn") <= names
    for folder in ("configs", "weights"):
        assert {f"visionattn/{name}" for name in tracked(folder)} <= names
    outside = {name for name in names if not name.startswith(("visionattn/", "visionattn-"))}
    assert outside == set()
    assert not any("__pycache__" in name or name.startswith("visionattn/tests") for name in names)


@pytest.mark.slow
def test_metadata(wheel):
    info = f"visionattn-{visionattn.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "visionattn"
    assert metadata["Version"] == visionattn.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert set(metadata.get_all("Provides-Extra")) >= {"diffusion", "detection", "natten", "dev", "all"}
    required = {r.split(";")[0].split(">")[0] for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch", "timm"} <= required
    assert "visionattn-train" in wheel.read(f"{info}/entry_points.txt").decode()

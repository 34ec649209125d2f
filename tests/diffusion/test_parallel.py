"""diffusers' context parallelism with a patch, on gloo processes: what one process computes (float64)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

from tests.diffusion.parallel_models import CASES  # noqa: E402
from visionattn.diffusion import Cross, Disk, Layout  # noqa: E402
from visionattn.diffusion.parallel import Shards, role, shards_of, why_not  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """By number of processes, what each wrote; they are started once."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.diffusion.parallel_models", str(folder)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in (2, 4)}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(name, results):
    size, *_, degrees = CASES[name]
    for found in (ranks[name] for ranks in results[size]):
        assert found["error"] < 1e-6 < 1e-2 < found["sparse"], found
        assert found["removed"] < 1e-6 and found["dense calls"] == 0, found
        for degree, text in (
            ("ulysses_degree", "Ulysses over"),
            ("ring_degree", "bands with halos (ring_degree) over"),
        ):
            assert (f"{text} {degrees.get(degree)} processes" in found["report"]) == (degree in degrees)


def test_compiled_blocks_stay_whole(results):
    for ranks in results[2]:
        assert max(ranks["compiled"]) < 1e-6


def test_dense_calls_are_diffusers_own(results):
    for ranks in results[2]:
        found = ranks["stays dense"]
        assert found["covers"] < 1e-6 and found["reason"] == "the pattern covers the whole grid"
        assert "'_native_math', which has no context parallelism: set one of" in found["error"]
        assert "'native', which has no ring attention: set_attention_backend" in found["ring error"]


def test_the_example_compares_with_one_process(results):
    printed = results[2][0]["example"]
    if printed == "no examples here":
        pytest.skip(printed)
    assert "bands with halos (ring_degree) over 2 processes" in printed
    assert float(re.search(r"one process: (\S+) of", printed)[1]) < 1e-4
    assert results[2][1]["example"] == ""  # one process speaks


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["--ring", "--ulysses"])
def test_two_gpus(kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *(os.path.abspath(p) for p in sys.path if p)])  # as this process finds packages
    done = subprocess.run(
        [*command, "examples/flux_multi_gpu.py", "--tiny", kind, "2"], capture_output=True, text=True, cwd=root,
        timeout=400, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(re.search(r"one process: (\S+) of", done.stdout)[1]) < 1e-3


def test_fewer_heads_than_processes(results):
    for ranks in results[4]:
        assert ranks["too few heads"].startswith("2 heads cannot be spread over 4 processes")


def test_parts_of_a_sequence():
    assert shards_of(None) is None
    shards = Shards(2, 2, 1, 0, None, None)
    assert shards.sizes(10) == (3, 3, 2, 2) and shards.block(10) == (2, 2) and shards.ring_sizes(10) == (6, 4)
    layout = Layout((4, 5), text=4, extra=4)
    assert role(layout, 7, 7, shards) == "joint"
    assert role(layout, 6, 6, shards) == "image"
    assert role(layout, 7, 6, shards) is None and role(layout, 28, 28, shards) is None
    assert why_not(Disk(2), shards) is None
    assert why_not(Cross(1, 1), shards) == (
        "Cross needs all rows at every process of a ring: use ulysses_degree instead"
    )
    assert why_not(Cross(1, 1), Shards(1, 4, 0, 0, None, None)) is None

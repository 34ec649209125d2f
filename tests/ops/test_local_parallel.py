"""Bands of rows over gloo processes: every process has the rows that one process alone would compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.parallel_local import CASES, WORLD
from visionattn.ops.local import Axis, Cross, Disk, Neighborhood, local_attention
from visionattn.ops.local.parallel import (
    exchanged_tokens,
    halo,
    local_attention_bands,
    split_rows,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the processes wrote; they are started once."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.parallel_local", str(folder)], capture_output=True, text=True, cwd=ROOT,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    return [json.loads((folder / f"all-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", [*CASES, "ragged", "heads"])
def test_equals_one_process(name, results):
    """Float64, outputs and gradients of q, k, v."""
    size = CASES[name][0] if name in CASES else WORLD
    errors = [r[name] for r in results if name in r]
    assert len(errors) == size
    assert max(errors) < 1e-12, errors


def test_wrong_sizes_are_one_line(results):
    for rank in range(2):
        assert results[rank]["error"] == f"process {rank} of 2 holds 0 text tokens and 6 of grid (4, 3), q has 7"


def test_a_lost_process_is_noticed(folder):
    for rank in range(WORLD - 1):
        found = json.loads((folder / f"lose-{rank}.json").read_text())
        assert "the processes could not exchange tokens" in found["message"] and "\n" not in found["message"]
        assert found["seconds"] < 40  # the group's timeout is 20 s


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_buffer_with_its_halo_is_the_whole_grid(data):
    """Rows of a band see the same keys in the buffer as in the grid, and none that was not fetched."""
    length = data.draw(st.integers(1, 24))
    dilation = data.draw(st.integers(1, max(length // 2, 1)))
    window = data.draw(st.integers(1, length // dilation))
    stride = data.draw(st.integers(1, window))
    pattern = Neighborhood(window, stride, dilation, data.draw(st.booleans()))
    if data.draw(st.integers(0, 4)) == 0:
        pattern = Disk(data.draw(st.floats(0.3, 12)))
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first, length - 1))
    near = halo(pattern, (length,), first, last)
    assert 0 <= near.start <= near.low < near.high <= near.stop <= length
    whole = pattern.mask((length,))[first : last + 1]
    part = pattern.mask((near.stop - near.start,))[first - near.start : last + 1 - near.start]
    seen = torch.zeros_like(whole)
    seen[:, near.start : near.stop] = part
    assert torch.equal(seen, whole)
    assert not seen[:, : near.low].any() and not seen[:, near.high :].any()
    if not isinstance(pattern, Neighborhood) or dilation == 1:  # no row is fetched for nothing
        assert seen[:, near.low].any() and seen[:, near.high - 1].any()


def test_halos_are_the_published_ones():
    grid = (512, 512)  # 8192 px, eight processes: 30 rows beside a band for r = 16, of at least 60 by two neighbours
    got = exchanged_tokens(grid, Disk(16), split_rows(grid, 8))
    assert got == (15 * 512, *(30 * 512,) * 6, 15 * 512)
    grid = (256, 256)
    got = exchanged_tokens(grid, Neighborhood(80, 16), split_rows(grid, 8))
    assert got == (48 * 256, *(64 * 256,) * 6, 48 * 256)
    assert exchanged_tokens((6, 4), Cross(1, 1), split_rows((6, 4), 2)) == (12, 12)
    assert halo(Neighborhood(3, 1, 2), (9,), 3, 3).stop == 6 and Axis(9, 3, 1, 2).group_length(1) == 4


def test_errors_without_a_group():
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(RuntimeError, match="is not initialised: start with torchrun"):
        local_attention_bands(x, x, x, (2, 2), Disk(1))
    with pytest.raises(ValueError, match="2 rows for 3 processes"):
        split_rows((2, 2), 3)
    with pytest.raises(ValueError, match="give 2 positive numbers of rows"):
        split_rows((4, 2), 2, (4, 0))
    assert local_attention(x, x, x, (2, 2), Disk(1)).shape == x.shape

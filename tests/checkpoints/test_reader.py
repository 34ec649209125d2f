"""The reader of untrusted checkpoints: what it reads, what it refuses, and that refusal is one line."""

import argparse
import collections
import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.extras import require_extra
from visionattn.checkpoints import CheckpointError, CorruptCheckpoint, Limits, UnsafeCheckpoint, read_checkpoint

from . import fuzz


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


class CfgNode(dict):
    """Stands for yacs's: a dict subclass with bookkeeping in its __dict__."""


CfgNode.__module__ = "yacs.config"


def save(content, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_training_scripts_save(tmp_path, zipped):
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    shared = torch.arange(12.0)
    content = dict(
        model=linear.state_dict(),
        optimizer=optimizer.state_dict(),
        args=argparse.Namespace(lr=0.1, sizes=[1, 2]),
        accuracy=np.float64(81.25),
        turned=torch.randn(4, 5).t(),
        parts=[shared[:6], shared[6:]],
        parameter=torch.nn.Parameter(torch.ones(2)),
        empty=torch.empty(0, 3),
        dtypes=[
            torch.ones(3, dtype=t) for t in (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64)
        ],
        shape=torch.Size([1, 2]),
        ordered=collections.OrderedDict(a=1, b=None),
    )
    read = read_checkpoint(save(content, tmp_path / "a.pth", zipped))
    expected = torch.load(tmp_path / "a.pth", weights_only=False)
    for name, value in expected["model"].items():
        assert torch.equal(read["model"][name], value)
    for name in ("turned", "parameter", "empty"):
        assert torch.equal(read[name], expected[name])
    for ours, theirs in zip(read["dtypes"], expected["dtypes"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    state = read["optimizer"]["state"]
    assert torch.equal(state[0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert read["args"] == {"lr": 0.1, "sizes": [1, 2]} and read["args"].kind == "argparse.Namespace"
    assert read["accuracy"] == 81.25 and read["shape"] == (1, 2) and read["ordered"] == {"a": 1, "b": None}
    read["parts"][0][0] = 7.0
    assert read["parts"][1].untyped_storage().data_ptr() == read["parts"][0].untyped_storage().data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_cfg_node_without_yacs(tmp_path, zipped, monkeypatch):
    import sys
    import types

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = CfgNode(MODEL=CfgNode(NAME="agent"), SEED=3)
    node.__dict__["__immutable__"] = True
    path = save({"model": {"w": torch.ones(2)}, "config": node}, tmp_path / "a.pth", zipped)
    monkeypatch.undo()
    read = read_checkpoint(path)
    assert read["config"] == {"MODEL": {"NAME": "agent"}, "SEED": 3}
    assert read["config"].kind == "yacs.config.CfgNode"


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_run_of_mmengine(tmp_path, zipped):
    """Beside its weights a Runner saves logged histories: objects of its own, with numpy arrays and bound methods."""
    logging = require_extra("mmengine.logging", "detection")
    history = logging.HistoryBuffer([1.5, 2.5], [1, 1])
    hub = {"log_scalars": collections.OrderedDict(loss=history), "runtime_info": collections.OrderedDict(iter=3)}
    meta = dict(epoch=1, dataset_meta=dict(classes=("a", "b"), palette=[(1, 2, 3)]))
    path = save({"state_dict": {"w": torch.ones(2)}, "meta": meta, "message_hub": hub}, tmp_path / "a.pth", zipped)
    read = read_checkpoint(path)
    assert torch.equal(read["state_dict"]["w"], torch.ones(2)) and read["meta"] == meta
    kept = read["message_hub"]["log_scalars"]["loss"]
    assert kept.kind == "mmengine.logging.history_buffer.HistoryBuffer" and kept["_log_history"]["shape"] == (2,)
    assert type(kept["_statistics_methods" if "_statistics_methods" in kept else "statistics_methods"]) is dict
    assert read["message_hub"]["runtime_info"] == {"iter": 3}


@pytest.mark.parametrize("owner", [b"cbuiltins\nobject\n", b"cnumpy\nndarray\n", b"ccollections\nOrderedDict\n"])
def test_getattr_is_for_records_alone(tmp_path, owner):
    """What is looked up in a class that the file names could be a way out; only records' method names are kept."""
    pickled = b"\x80\x02cbuiltins\ngetattr\n" + owner + b"X\x0e\x00\x00\x00__subclasses__\x86R."
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", pickled)
        z.writestr("a/version", "3")
    with pytest.raises(UnsafeCheckpoint, match=r"getattr"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_not_run(tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save({"model": {"w": torch.ones(2)}, "extra": Evil()}, tmp_path / "evil.pth", zipped)
    with pytest.raises(UnsafeCheckpoint, match=r"evil.pth.*system") as e:
        read_checkpoint(path)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # so the file was dangerous


def test_every_truncation_is_refused(tmp_path):
    for number, data in enumerate(fuzz.seeds()):
        path = tmp_path / f"{number}.pth"
        for length in range(0, len(data) - 1, 37):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError):
                read_checkpoint(path)


def test_a_flipped_weight_is_noticed(tmp_path):
    data = bytearray(fuzz.seeds()[0])
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        at = bytes(data).index(archive.read(name))
    data[at + 2] ^= 1
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        read_checkpoint(path)


def test_limits_and_shapes(tmp_path):
    path = save({"w": torch.ones(1).expand(4096, 4096)}, tmp_path / "wide.pth")
    with pytest.raises(UnsafeCheckpoint, match="expanded over the limit"):
        read_checkpoint(path)
    assert read_checkpoint(path, Limits(tensor_elements=1 << 24))["w"].shape == (4096, 4096)
    with pytest.raises(UnsafeCheckpoint, match="larger than 100 bytes"):
        read_checkpoint(path, Limits(file_bytes=100))
    nested = value = []
    for _ in range(100):
        value.append([])
        value = value[0]
    with pytest.raises(UnsafeCheckpoint, match="nests deeper"):
        read_checkpoint(save(nested, tmp_path / "deep.pth"))
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_checkpoint(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(CorruptCheckpoint, match="neither a torch file nor safetensors"):
        read_checkpoint(tmp_path / "text.pth")


def test_mutated_files_do_no_harm(tmp_path):
    """A sample of the fuzz run in docs/checkpoints.md; a process of its own, since it hooks the interpreter."""
    import subprocess
    import sys

    first = random.Random(0).randrange(10**6)
    command = [sys.executable, "-m", "tests.checkpoints.fuzz", "--worker", f"--first={first}", "--files=600"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = {key: int(n) for n, _, key in (line.partition("\t") for line in done.stdout.splitlines())}
    assert min(outcomes["read"], outcomes["CorruptCheckpoint"], outcomes["UnsafeCheckpoint"]) > 0

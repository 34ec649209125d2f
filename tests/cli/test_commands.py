"""The command line as a user calls it: every command's help, one real use of each, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visionattn.cli.main import build_parser, main

FOLDER = str(Path(__file__).parent)


def call(*argv: str, status: int = 0, capsys=None) -> str:
    assert main(list(argv)) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def commands() -> list[list[str]]:
    parser = build_parser()
    (choices,) = (a.choices for a in parser._subparsers._group_actions)
    paths = []
    for name, sub in choices.items():
        nested = [a.choices for a in (sub._subparsers._group_actions if sub._subparsers else [])]
        paths += [[name, action] for action in nested[0]] if nested else [[name]]
    return paths


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help(path, capsys):
    out = call(*path, "--help", capsys=capsys)
    assert "--json" in out and "usage: visionattn " + " ".join(path) in out


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "visionattn", "list", "halo*", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {"name": "halo_h1", "kind": "backbone", "weights": None} in rows
    assert {"name": "halo", "kind": "mixer module", "weights": None} in rows


def test_info_counts(capsys):
    facts = json.loads(call("info", "halo_h1", "--json", capsys=capsys))
    assert facts["parameters"] == 8_084_936
    assert facts["strides"] == [4, 8, 16, 32]
    assert 2.5e9 < facts["MACs"] < 3.5e9
    larger = json.loads(call("info", "halo_h1", "--img-size", "512", "--json", capsys=capsys))
    assert larger["MACs"] == pytest.approx(4 * facts["MACs"], rel=0.01)


def test_doctor_says_what_runs(capsys):
    facts = json.loads(call("doctor", "--json", capsys=capsys))
    assert facts["torch"] and facts["timm"]
    kernels = [facts[name] for name in facts if name.endswith(("attention", "heads", "residual"))]
    assert len(kernels) == 7 and all(k.startswith(("triton", "reference; not triton: ")) for k in kernels)
    assert facts["extra diffusion"].startswith(("installed", "not installed: pip install"))


def test_card(tmp_path, capsys):
    card = call("card", "halo_h1", capsys=capsys)
    assert card.startswith("# halo_h1") and "| parameters | 8,084,936 |" in card
    call("card", "halo_h1", "--out", str(tmp_path / "card.md"), capsys=capsys)
    assert (tmp_path / "card.md").read_text() == card


@pytest.mark.parametrize(
    "argv, message",
    [
        (["lst"], "did you mean 'list'?"),
        (["info", "halo_h9"], "halo_h"),
        (["list", "zzz"], "nothing matches 'zzz'"),
        (["info", "halo_h1", "--img-size", "0"], "--img-size: 0 is not a whole number from 1 on"),
        (["predict", "test_mala.digit"], "test_mala has no weights under the tag 'digit': its tags are digits"),
        (["card", "test_halo", "--out", FOLDER], f"error: {FOLDER} can't be used: is a directory"),
        (["card", "test_halo", "--out", "/proc/none/card.md"], "/proc/none can't be used: no such file or directory"),
        (["weights", "fetch", "mala_smal.in1k"], "did you mean mala_small.in1k"),
        (["weights", "fetch", "mala_tiny.in1k"], "has no address"),
        (["weights", "verify", "nothing.pth"], "nothing.pth is not a file"),
        (["weights", "convert", "nothing.pth", "--to", "test_halo"], "nothing.pth is not a file"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONATTN_HOME", str(tmp_path))
    assert main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1

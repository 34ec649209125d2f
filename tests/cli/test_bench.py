"""``visionattn bench``: rows, what is kept when it is interrupted, and its errors."""

import csv
import json

import pytest
import timm
from PIL import Image

from tests.cli.test_commands import call
from visionattn.cli import bench
from visionattn.cli.main import main

QUICK = ["--sizes", "32", "--seconds", "0.001"]


def rows(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_go_on_after_an_interruption(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second row keeps the first; the same command measures only what is missing."""
    out = tmp_path / "new" / "x.csv"
    argv = ["bench", "test_ninformer", "test_ela", *QUICK, "--batches", "1", "2", "--out", str(out)]
    measure, calls = bench.measure, []

    def interrupted(case, *args):
        calls.append(case.key())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(bench, "measure", interrupted)
    assert main(argv) == 130
    assert "interrupted after 1 of 4 rows: the same command goes on" in capsys.readouterr().out
    first = rows(out)
    assert [(r["model"], r["batch"]) for r in first] == [("test_ninformer", "1")]
    calls[:] = ["counted", "as later ones"]
    found = json.loads(call(*argv, "--json", capsys=capsys))
    assert [(r["model"], r["batch"]) for r in found] == [
        ("test_ninformer", 1), ("test_ninformer", 2), ("test_ela", 1), ("test_ela", 2)
    ]  # fmt: skip
    assert len(calls) == 5 and rows(out)[0] == first[0]
    for row in rows(out):
        ms, per_second = float(row["ms"]), float(row["images_per_s"])
        assert per_second == pytest.approx(1e3 * int(row["batch"]) / ms, rel=0.01)
        assert ms <= float(row["ms_p90"]) or float(row["ms_p90"]) == pytest.approx(ms, rel=0.5)
        built = timm.create_model(row["model"])
        assert float(row["Mparams"]) == pytest.approx(sum(p.numel() for p in built.parameters()) / 1e6, abs=1e-3)
        assert float(row["memory_MiB"] or 0) >= 0
    with Image.open(out.with_suffix(".png")) as picture:
        picture.load()
    assert sorted(p.name for p in out.parent.iterdir()) == ["x.csv", "x.png"]


def test_training_and_a_model_that_fails(tmp_path, capsys, monkeypatch):
    """A model that can't be measured has a row with the reason; the others have their numbers."""
    build = bench.build
    monkeypatch.setattr(bench, "build", lambda name, size: build(name, size) if name != "test_ela" else 1 / 0)
    argv = ["bench", "test_ninformer", "test_ela", *QUICK, "--batches", "2", "--tasks", "train", "--json"]
    good, bad = json.loads(call(*argv, "--dtypes", "bfloat16", capsys=capsys))
    assert good["images_per_s"] > 0 and good["note"] is None and good["dtype"] == "bfloat16"
    assert bad["images_per_s"] is None and bad["note"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["test_elaa"], "did you mean test_ela"),
        (["nothing_*"], "no model of the zoo matches"),
        (["test_ela", "--out", "x.txt"], "ends in .csv"),
        (["test_ela", "--device", "cuda:77"], "--device cpu works"),
        (["test_ela", "--seconds", "0"], "more than 0"),
        (["test_ela", "--batches", "0"], "not a whole number from 1 on"),
        (["test_ela", "--out", "other.csv"], "other columns"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("model,speed\nx,1\n")
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "other.csv").read_text() == "model,speed\nx,1\n"

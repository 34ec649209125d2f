"""Every table of results that ``benchmarks/pictures.py`` knows can be drawn."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.extras import require_extra

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "pictures.py"


def draw(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_each_table(monkeypatch, tmp_path):
    require_extra("matplotlib")
    draw(monkeypatch, "--out", tmp_path)
    results, kinds = ROOT / "benchmarks" / "results", ("flux-", "video-", "local-table-")
    tables = [path for kind in kinds for path in results.glob(f"{kind}*.csv")]
    assert len(tables) >= 4
    for table in tables:
        picture = tmp_path / f"{table.stem}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_bad_files(monkeypatch, tmp_path):
    require_extra("matplotlib")
    with pytest.raises(SystemExit, match="no picture of that"):
        draw(monkeypatch, tmp_path / "other.csv")
    with pytest.raises(SystemExit, match="no such file"):
        draw(monkeypatch, tmp_path / "flux-none.csv")

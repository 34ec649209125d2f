"""The conformance suite itself: it discriminates, it covers what it says, and its table of exclusions is alive."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import timm

import visionattn  # noqa: F401  (registers the models)

from . import broken_models, plugin, selection
from .fetch import FetchError, fetch

ROOT = Path(__file__).resolve().parents[2]


def suite(*arguments: str) -> subprocess.CompletedProcess:
    try:
        fetch()
    except FetchError as error:
        if os.environ.get("VISIONATTN_REQUIRE_EXTRAS"):
            raise
        pytest.skip(f"needs the package registry: {error}")
    command = [sys.executable, "-m", "tests.conformance.run", "--jobs", "0", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def failures(output: str) -> dict[str, set[str]]:
    """What the summary reports: the failed test kinds by model."""
    found: dict[str, set[str]] = {}
    for line in output.partition("conformance to timm's contract")[2].splitlines():
        if re.match(r"\w+ +\d+ +\d+ ", line):
            found[line.split()[0]] = set()
        elif match := re.match(r"    failed (\w+):", line):
            found[list(found)[-1]].add(match[1])
    found.pop("total", None)
    return found


def test_discriminates():
    """A sound model passes everything; each defect is found by the tests that are there for it, and by no other."""
    run = suite("--module", broken_models.__name__, "--models", ",".join(broken_models.DEFECTS))
    assert run.returncode == 1, run.stdout + run.stderr
    assert failures(run.stdout) == broken_models.DEFECTS, run.stdout
    assert re.search(r"^sound +11 +0 ", run.stdout, re.MULTILINE), run.stdout


def test_nothing_collected_is_a_failure():
    run = suite("--models", "test_ela", "-k", "no_test_is_called_so")
    assert run.returncode == 1
    assert "forward did not run over test_ela" in run.stdout


def test_unknown_model_is_an_error():
    run = suite("--models", "no_such_model")
    assert run.returncode != 0
    assert "'no_such_model' is not registered with timm" in run.stdout + run.stderr


def test_exclusions_are_alive():
    kinds = {kind for kind in plugin.TESTS.values() if kind}
    kinds |= set(re.findall(r'@over_models\("(\w+)"\)', (ROOT / "tests/conformance/test_extra.py").read_text())) | {
        "onnx"
    }
    for row in selection.EXCLUSIONS:
        assert any(fnmatchcase(name, row.pattern) for name in selection.ours()), f"{row.pattern} matches no model"
        assert row.test in kinds, f"{row.test} is no test"
        assert len(row.reason) > 20, f"{row.pattern}: give a reason"


def test_exclusions_are_documented():
    """The table in the docs is the one that is applied: no row more, no row less."""
    section = (ROOT / "docs" / "conformance.md").read_text().partition("## Exclusions")[2].partition("\n## ")[0]
    rows = [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in table(section)]
    assert rows == [tuple(row) for row in selection.EXCLUSIONS]


def table(text: str) -> list[str]:
    """The rows of the one table in a piece of markdown, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert set(lines[1]) <= set("|-: ")
    return lines[2:]


def test_selection_covers_every_family():
    chosen = selection.smallest()
    families = {timm.models.model_entrypoint(name).__module__ for name in selection.ours()}
    assert {timm.models.model_entrypoint(name).__module__ for name in chosen} == families
    assert set(selection.small()) <= set(chosen)
    # hosts of one family that differ in kind, and the same host once
    assert {"ela_t_resnet18", "ela_t_resnet50"} <= set(chosen)
    assert "ela_t_resnet101" not in chosen
    # a layer more is another host, layer scale is none: test_nat has it
    assert {"transnext_micro", "moh_vit_small_75", "dinat_mini"} <= set(chosen) and "nat_small" not in chosen
    assert len(chosen) < len(selection.ours())


def test_models_of_tokens_are_recognised():
    assert selection.is_non_std("ninformer_small_patch16_224")
    assert selection.is_non_std("test_ninformer.untrained")
    assert not selection.is_non_std("ela_b_mobilenetv2")


def test_every_model_has_a_cfg():
    """timm's tests leave a model without one out (``name_matches_cfg``)."""
    assert [name for name in selection.ours() if not selection.has_cfg(name)] == []

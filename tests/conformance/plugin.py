"""A pytest plugin that runs timm's ``tests/test_models.py`` over the models of another package.

timm's file enumerates ``timm.list_models(...)`` when it is imported. Under this plugin those calls return a marked,
empty list; a test that is parametrized with a marked list then gets our models instead, by the table ``TESTS``, and
every other test of the file (they name models of timm's) is deselected. So timm's assertions run unchanged, and only
what they are given differs. What was expected to run and did not is a failure, as is an enumerating test that ``TESTS``
does not know.

Environment: ``VISIONATTN_CONFORMANCE_MODELS`` (names, with commas between), ``VISIONATTN_CONFORMANCE_IMPORT`` (the
module that registers them, ``visionattn`` if unset), ``VISIONATTN_CONFORMANCE_SUMMARY`` (a file for the summary).
"""

import importlib
import os
import platform
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch

from .selection import excluded, has_cfg, is_non_std, tags

# timm's enumerating tests and what this plugin calls them; None: they load weights from the hub, and are not run
TESTS: dict[str, str | None] = {
    "test_model_forward": "forward",
    "test_model_backward": "backward",
    "test_model_default_cfgs": "cfg",
    "test_model_default_cfgs_non_std": "cfg_nonstd",
    "test_model_forward_torchscript": "torchscript",
    "test_model_forward_features": "features",
    "test_model_forward_intermediates_features": "features_getter",
    "test_model_forward_intermediates": "intermediates",
    "test_prune_intermediate_layers_contract": "prune",
    "test_model_forward_fx": "fxforward",
    "test_model_backward_fx": "fxbackward",
    "test_model_forward_fx_torchscript": "fx_torchscript",
    "test_model_features_space2depth_reduction": None,  # enumerates two EfficientNets of timm's
    "test_model_inference": None,
    "test_model_load_pretrained": None,
    "test_model_features_pretrained": None,
}
# timm leaves out the maps of a model without maps, and checks its cfg in a test of its own
STD_ONLY = ("cfg", "features")
NON_STD_ONLY = ("cfg_nonstd",)
# the one reason for which timm's tests may skip a model: an input size that cannot shrink
ALLOWED_SKIP = "Fixed input size model > limit."
# timm's limits of two minutes are for its own runners; here one only has to end a hang
TIMEOUT = 900

MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")


class Enumeration(list):
    """What timm's test file gets for a list of models."""


def expected(names: list[str]) -> dict[str, list[str]]:
    """For each of our test kinds the model names (with tags, for the cfg tests) that it has to run over."""
    wanted: dict[str, list[str]] = {}
    for kind in filter(None, TESTS.values()):
        models = [name for name in names if not excluded(name, kind)]
        if kind in STD_ONLY:
            models = [name for name in models if not is_non_std(name)]
        if kind in NON_STD_ONLY:
            models = [name for name in models if is_non_std(name)]
        if kind in STD_ONLY[:1] + NON_STD_ONLY:
            models = [tagged for name in models for tagged in tags(name)]
        wanted[kind] = models
    return wanted


class Suite:
    """Parametrizes timm's tests with our models, and keeps the account of what ran."""

    def __init__(self, names: list[str]):
        self.names = names
        self.expected = expected(names)
        self.results: dict[tuple[str, str], tuple[str, float, str]] = {}  # (kind, model): outcome, seconds, detail
        self.complaints: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        function = metafunc.definition.name
        for mark in list(metafunc.definition.iter_markers("parametrize")):
            if len(mark.args) > 1 and isinstance(mark.args[1], Enumeration):
                if function not in TESTS:
                    pytest.exit(
                        f"timm {timm.__version__} enumerates models in {function}, which {__name__}.TESTS lacks", 3
                    )
                # pytest made one item list per mark: the names are put in before it reads them
                mark.args[1][:] = self.expected.get(TESTS[function] or "", [])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        kept, dropped = [], []
        for item in items:
            kind = TESTS.get(item.originalname)
            name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
            if kind and name in self.expected[kind]:
                item.user_properties.append(("conformance", (kind, name)))
                item.own_markers = [mark for mark in item.own_markers if mark.name != "timeout"]
                item.add_marker(pytest.mark.timeout(TIMEOUT))
                kept.append(item)
            else:
                dropped.append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_logreport(self, report):
        key = dict(report.user_properties).get("conformance")
        if key is None:
            return
        kind, name = key
        outcome, seconds, detail = self.results.get((kind, name), ("none", 0.0, ""))
        seconds += report.duration
        if report.failed:
            outcome, detail = "failed", _last_line(report)
        elif report.skipped:
            outcome, detail = "skipped", report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            if ALLOWED_SKIP not in detail:
                outcome = "failed"
        elif report.when == "call" and outcome != "failed":
            outcome = "passed"
        self.results[kind, name] = (outcome, seconds, detail)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if hasattr(session.config, "workerinput") or session.config.option.collectonly:
            return
        missing = [
            f"{kind} did not run over {name}"
            for kind, names in self.expected.items()
            for name in names
            if (kind, name) not in self.results
        ]
        if not any(self.expected.values()):
            missing.append("there was no model to run over")
        failed = [key for key, (outcome, _, _) in self.results.items() if outcome == "failed"]
        self.complaints = missing
        if (missing or failed) and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if config.option.collectonly:
            return
        lines = self.summary()
        terminalreporter.section("conformance to timm's contract")
        for line in lines:
            terminalreporter.write_line(line)
        if path := os.environ.get("VISIONATTN_CONFORMANCE_SUMMARY"):
            temporary = Path(f"{path}.tmp")
            temporary.write_text("\n".join(lines) + "\n")
            os.replace(temporary, path)

    def summary(self) -> list[str]:
        rows = defaultdict(lambda: defaultdict(list))
        for (kind, name), (outcome, seconds, detail) in self.results.items():
            rows[name.partition(".")[0]][outcome].append((kind, seconds, detail))
        lines = [
            f"tests/test_models.py of timm {timm.__version__} over {len(self.names)} models",
            f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, on the CPU",
            "",
            f"{'model':34s} {'passed':>6s} {'failed':>6s} {'skipped':>7s} {'excused':>7s} {'seconds':>8s}",
        ]
        totals = [0, 0, 0, 0, 0.0]
        for name in self.names:
            row = rows[name]
            excused = [kind for kind in filter(None, TESTS.values()) if excluded(name, kind)]
            counts = [len(row["passed"]), len(row["failed"]), len(row["skipped"]), len(excused)]
            counts.append(sum(seconds for tests in row.values() for _, seconds, _ in tests))
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
            lines.append("{:34s} {:6d} {:6d} {:7d} {:7d} {:8.1f}".format(name, *counts))
            lines += [f"    failed {kind}: {detail}" for kind, _, detail in row["failed"]]
            lines += [f"    skipped {kind}: {detail}" for kind, _, detail in row["skipped"]]
            lines += [f"    excused from {kind}: {excluded(name, kind)}" for kind in excused]
        lines.append("{:34s} {:6d} {:6d} {:7d} {:7d} {:8.1f}".format("total", *totals))
        return lines + self.complaints


def _last_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return text.strip().splitlines()[0][:300] if text.strip() else "?"


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: a marker of timm's")
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # the workers share the cores
    importlib.import_module(os.environ.get("VISIONATTN_CONFORMANCE_IMPORT", "visionattn"))
    names = [name for name in os.environ.get("VISIONATTN_CONFORMANCE_MODELS", "").split(",") if name]
    for name in names:
        if not timm.is_model(name):
            raise pytest.UsageError(f"{name!r} is not registered with timm")
        if not has_cfg(name):
            raise pytest.UsageError(f"{name!r} has no pretrained cfg: timm's tests read its input size there")
    config.pluginmanager.register(Suite(names), "visionattn-conformance")

    def list_models(*args, **kwargs) -> Enumeration:
        return Enumeration()

    timm.list_models = timm.models.list_models = list_models
    timm.list_pretrained = timm.models.list_pretrained = list_models

"""Settings of every test: one thread a worker, no network, skips that say why.

Tests of an optional package call :func:`tests.extras.require_extra`; under ``VISIONATTN_REQUIRE_EXTRAS=1``, as CI sets
it, a missing extra fails them.
"""

import os
import sys

# before torch and the hub's client are imported, also in the processes that tests start
for _variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_variable] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.extras import missing_module  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_teardown():
    """The compiler's caches go with the test: else the ninth compilation of one forward method in a process fails, and
    which test that is depends on the order."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report) -> None:
    """Turns a skip for a missing package into a failure where the extras have to be there."""
    if os.environ.get("VISIONATTN_REQUIRE_EXTRAS") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if module := missing_module(reason):
        report.outcome = "failed"
        report.longrepr = f"VISIONATTN_REQUIRE_EXTRAS=1, and {module!r} is missing: {reason}"

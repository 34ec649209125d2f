"""Optional packages in tests: a skip with its reason, which CI turns into a failure (tests/conftest.py)."""

import importlib
import importlib.util
import re
from types import ModuleType

import pytest


def require_extra(module: str, extra: str = "dev") -> ModuleType:
    """Imports ``module``, or skips the test; says which extra brings it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"missing extra: {module} (pip install -e '.[{extra}]')", allow_module_level=True)
    return importlib.import_module(module)


def missing_module(reason: str) -> str | None:
    """The package whose absence a skip's reason names, be it from here or from ``pytest.importorskip``."""
    match = re.search(r"missing extra: ([\w.]+)", reason) or re.search(r"could not import '([\w.]+)'", reason)
    return match[1] if match else None

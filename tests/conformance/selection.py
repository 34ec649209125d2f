"""Which models the conformance tests run over, and which tests they are excused from."""

import fnmatch
import os
from typing import NamedTuple

import timm
from timm.models import get_pretrained_cfg, model_entrypoint

# Models that give tokens instead of maps: timm's suite has a list of the same name and checks such models without the
# spatial parts (``features_only`` pyramids, ``global_pool=''``).
NON_STD = ("ninformer_*", "test_ninformer")


class Exclusion(NamedTuple):
    pattern: str
    test: str  # a key of plugin.TESTS, or the name of a test of test_extra.py
    reason: str


# Every test that a model is excused from. docs/conformance.md repeats this table; a test compares the two.
EXCLUSIONS: tuple[Exclusion, ...] = ()


def excluded(name: str, test: str) -> str | None:
    """The reason for which model ``name`` is excused from ``test``, or None."""
    base = name.partition(".")[0]
    for row in EXCLUSIONS:
        if row.test == test and fnmatch.fnmatchcase(base, row.pattern):
            return row.reason
    return None


def is_non_std(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.partition(".")[0], pattern) for pattern in NON_STD)


def ours(package: str = "visionattn") -> list[str]:
    """Every name that ``package`` registered with timm; the package has to be imported already."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.split(".")[0] == package]


def small() -> list[str]:
    """The zoo's ``test_*`` models."""
    return [name for name in ours() if name.startswith("test_")]


def smallest() -> list[str]:
    """The ``test_*`` models and the smallest variant of each family and host.

    A family is a module that registers models. Two of its models share a host where they have the same class and are
    made of the same kinds of layers: ResNet-18 and ResNet-50 differ (basic and bottleneck blocks), widths and depths
    don't. So a new family takes part without an entry in a table.
    """
    chosen: dict[tuple, tuple[int, str]] = {}
    for name in ours():
        if name.startswith("test_"):
            continue
        model = timm.create_model(name, device="meta")
        layers = frozenset(type(module).__qualname__ for module in model.modules())
        host = (model_entrypoint(name).__module__, type(model).__qualname__, layers)
        candidate = (sum(p.numel() for p in model.parameters()), name)
        chosen[host] = min(chosen.get(host, candidate), candidate)
    return small() + sorted(name for _, name in chosen.values())


def everything() -> bool:
    """Whether the one switch asks for every registered name."""
    return os.environ.get("VISIONATTN_CONFORMANCE") == "all"


def tags(name: str) -> list[str]:
    """``name.tag`` for each pretrained cfg of a model, ``name`` where there is none."""
    names = []
    for tagged in timm.list_models(f"{name}", include_tags=True):
        if tagged.partition(".")[0] == name:
            names.append(tagged)
    return names or [name]


def has_cfg(name: str) -> bool:
    return get_pretrained_cfg(name) is not None

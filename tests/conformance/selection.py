"""Which models the conformance tests run over, and which tests they are excused from."""

import fnmatch
import functools
import os
import re
from typing import NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint

from visionattn._meta import NoInit


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


class Skeleton(NamedTuple):
    """What tells models of one family apart, known without memory for the weights."""

    module: str
    cls: str
    layers: frozenset[str]
    parameters: int


@functools.cache
def skeleton(name: str) -> Skeleton:
    with NoInit():
        model = timm.create_model(name, device="meta")
    layers = {type(module).__qualname__ for module in model.modules()} - {"Identity", "DropPath", "Dropout"}
    # the last parts of the parameters' names tell apart what one class is with and without an option
    layers |= {re.sub(r"\d+", "", ".".join(name.split(".")[-2:])) for name, _ in model.named_parameters()}
    parameters = sum(p.numel() for p in model.parameters())
    return Skeleton(model_entrypoint(name).__module__, type(model).__qualname__, frozenset(layers), parameters)


def is_non_std(name: str) -> bool:
    """Whether a model gives tokens instead of maps.

    timm's suite keeps a list of such models (NON_STD_FILTERS) and checks them without the spatial parts. Here a model
    is asked, or the smallest of its family that has the same class.
    """
    base = name.partition(".")[0]
    like = [twin for twin in small(base) if skeleton(twin)[:2] == skeleton(base)[:2]]
    return _gives_tokens(min([base, *like], key=lambda twin: skeleton(twin).parameters))


@functools.cache
def _gives_tokens(name: str) -> bool:
    with torch.no_grad():
        return timm.create_model(name).eval().forward_features(torch.zeros(1, *input_size(name))).ndim == 3


def input_size(name: str, limit: int = 128) -> tuple[int, int, int]:
    """The input size of a model, no larger than ``limit`` where its size is free."""
    cfg = get_pretrained_cfg(name)
    if cfg.fixed_input_size:
        return cfg.input_size
    if cfg.min_input_size and max(cfg.input_size) > limit:
        return cfg.min_input_size
    return (cfg.input_size[0], *(min(side, limit) for side in cfg.input_size[1:]))


def ours(package: str = "visionattn") -> list[str]:
    """Every name that ``package`` registered with timm; the package has to be imported already."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.split(".")[0] == package]


def small(sibling: str | None = None) -> list[str]:
    """The zoo's ``test_*`` models; of the package that registered ``sibling``, where given."""
    package = model_entrypoint(sibling).__module__.split(".")[0] if sibling else "visionattn"
    return [name for name in ours(package) if name.startswith("test_")]


def smallest() -> list[str]:
    """The ``test_*`` models and the smallest variant of each family and host.

    A family is a module that registers models. Two of its models share a host where they have the same class and are
    made of the same kinds of layers: ResNet-18 and ResNet-50 differ (basic and bottleneck blocks), widths, depths and
    rates of dropout don't. A mere parameter more (layer scale), and no layer, makes a host of its own only where no
    ``test_*`` model has it. So a new family takes part without an entry in a table.
    """
    covered = [skeleton(name)[:3] for name in small()]
    chosen: dict[tuple, tuple[int, str]] = {}
    for name in ours():
        if not name.startswith("test_"):
            module, cls, layers, parameters = skeleton(name)
            if any(test[:2] == (module, cls) and layers <= test[2] for test in covered):
                layers = frozenset(x for x in layers if "." not in x or x.endswith((".weight", ".bias")))
            host = (module, cls, layers)
            chosen[host] = min(chosen.get(host, (parameters, name)), (parameters, name))
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

"""The registry of modules, beside timm's registry of backbones.

Two kinds: ``channel`` modules take and return a map (B, C, H, W) and go into any CNN (:func:`insert`); ``mixer``
modules take tokens (B, N, C) and their grid (H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

KINDS = ("channel", "mixer")


@dataclass(frozen=True)
class _Entry:
    kind: str
    cls: type[nn.Module]
    preset: dict[str, Any]


_modules: dict[str, _Entry] = {}


def register_module(name: str, kind: str, **preset: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that registers a module under ``name``; ``preset`` are arguments which the name fixes.

    Raises:
        ValueError: for a kind that is not one of :data:`KINDS`, or a name that is taken.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: use one of {', '.join(KINDS)}")
    if name in _modules:
        raise ValueError(f"module {name!r} is registered already: choose another name")

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        _modules[name] = _Entry(kind, cls, preset)
        return cls

    return register


def list_modules(kind: str | None = None) -> list[str]:
    """Sorted names of the registered modules, of one kind (``'channel'``, ``'mixer'``) or of all.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: use one of {', '.join(KINDS)}, or None for all")
    return sorted(name for name, entry in _modules.items() if kind in (None, entry.kind))


def module_kind(name: str) -> str:
    """The kind of the module registered as ``name``; ValueError for a name that is not registered."""
    return _lookup(name).kind


def module_class(name: str) -> type[nn.Module]:
    """The class behind ``name``; ValueError for a name that is not registered."""
    return _lookup(name).cls


def module_preset(name: str) -> dict[str, Any]:
    """The arguments that ``name`` fixes; ValueError for a name that is not registered."""
    return dict(_lookup(name).preset)


def create_module(name: str, **kwargs: Any) -> nn.Module:
    """Build a registered module, for example ``create_module('ela_b', channels=64)``.

    Raises:
        ValueError: for a name that is not registered, or values that the module refuses.
        TypeError: for an argument that the module does not have.
    """
    entry = _lookup(name)
    return entry.cls(**{**entry.preset, **kwargs})


def _lookup(name: str) -> _Entry:
    if name not in _modules:
        near = get_close_matches(str(name), _modules, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered are {', '.join(list_modules())}"
        raise ValueError(f"no module is called {name!r}: {hint}")
    return _modules[name]

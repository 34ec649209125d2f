"""The registry of modules, beside timm's registry of backbones.

Two kinds: ``channel`` modules take and return a map (B, C, H, W) and go into any CNN (:func:`insert`); ``mixer``
modules take tokens (B, N, C) and their grid (H, W).
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

KINDS = ("channel", "mixer")

_modules: dict[str, tuple[str, Callable[..., nn.Module]]] = {}


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
        _modules[name] = (kind, partial(cls, **preset) if preset else cls)
        return cls

    return register


def list_modules(kind: str | None = None) -> list[str]:
    """Sorted names of the registered modules, of one kind (``'channel'``, ``'mixer'``) or of all.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: use one of {', '.join(KINDS)}, or None for all")
    return sorted(name for name, (its_kind, _) in _modules.items() if kind in (None, its_kind))


def module_kind(name: str) -> str:
    """The kind of the module registered as ``name``.

    Raises:
        ValueError: for a name that is not registered.
    """
    return _lookup(name)[0]


def create_module(name: str, **kwargs: Any) -> nn.Module:
    """Build a registered module, for example ``create_module('ela_b', channels=64)``.

    Raises:
        ValueError: for a name that is not registered, or values that the module refuses.
        TypeError: for an argument that the module does not have.
    """
    return _lookup(name)[1](**kwargs)


def _lookup(name: str) -> tuple[str, Callable[..., nn.Module]]:
    if name not in _modules:
        near = get_close_matches(str(name), _modules, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered are {', '.join(list_modules())}"
        raise ValueError(f"no module is called {name!r}: {hint}")
    return _modules[name]

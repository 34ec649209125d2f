"""Imports what registers models; see registry.py."""

import importlib.util

from . import backbone

__all__ = ["backbone"]

if importlib.util.find_spec("mmdet") is not None:  # mmsegmentation alone can use the backbone
    from . import ela

    __all__ += ["ela"]

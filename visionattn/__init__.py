"""visionattn: published vision attention for PyTorch.

Importing it registers every backbone of the zoo with timm (``timm.create_model``) and every module with
:func:`create_module`.
"""

from . import models
from .layers.insert import insert
from .layers.registry import create_module, list_modules
from .layers.to_moh import to_moh
from .models.dit import create_dit
from .ops.local.patterns import Cross, Disk, Neighborhood

__version__ = "0.1.0"

__all__ = [
    "Cross",
    "Disk",
    "Neighborhood",
    "__version__",
    "create_dit",
    "create_module",
    "insert",
    "list_modules",
    "models",
    "to_moh",
]

# their imports cost time, and some need an extra
_LAZY = {"attention_maps": "visionattn.maps", "agent_sd": "visionattn.diffusion", "sparsify": "visionattn.diffusion"}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'visionattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

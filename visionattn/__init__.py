"""visionattn: published vision attention for PyTorch.

Importing it registers every backbone of the zoo with timm (``timm.create_model``) and every module with
:func:`create_module`.
"""

from . import models
from .layers.insert import insert
from .layers.registry import create_module, list_modules
from .ops.local.patterns import Cross, Disk, Neighborhood

__version__ = "0.1.0"

__all__ = ["Cross", "Disk", "Neighborhood", "__version__", "create_module", "insert", "list_modules", "models"]

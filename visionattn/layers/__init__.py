"""One published mechanism, one file; and the registry of modules."""

from .ela import ELA
from .halo import HaloAttention
from .insert import Insertion, insert
from .nin import FeedForward, MixerBlock, MixerGatingUnit, NiNBlock
from .registry import create_module, list_modules, module_kind, register_module
from .residual import Residual
from .ulsam import ULSAM, SubSpace

__all__ = [
    "ELA",
    "ULSAM",
    "FeedForward",
    "HaloAttention",
    "Insertion",
    "MixerBlock",
    "MixerGatingUnit",
    "NiNBlock",
    "Residual",
    "SubSpace",
    "create_module",
    "insert",
    "list_modules",
    "module_kind",
    "register_module",
]

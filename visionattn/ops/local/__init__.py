"""Attention inside windows and disks of a grid, text tokens always visible (GNA, CLEAR)."""

from .api import explain, local_attention
from .call import pool_tokens
from .merge import merge
from .patterns import Axis, Cross, Disk, Neighborhood, Pattern
from .planner import BACKENDS, worthwhile

__all__ = [
    "BACKENDS",
    "Axis",
    "Cross",
    "Disk",
    "Neighborhood",
    "Pattern",
    "explain",
    "local_attention",
    "merge",
    "pool_tokens",
    "worthwhile",
]

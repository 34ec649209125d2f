"""Attention inside windows and disks of a grid, text tokens always visible (GNA, CLEAR)."""

from .api import local_attention
from .call import pool_tokens
from .merge import merge
from .patterns import Axis, Cross, Disk, Neighborhood, Pattern

__all__ = ["Axis", "Cross", "Disk", "Neighborhood", "Pattern", "local_attention", "merge", "pool_tokens"]

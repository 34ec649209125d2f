"""Halo attention (HaloNet, arXiv 2103.12731, section 3): blocks of queries, each over its block and a halo around it."""

from .api import halo_attention

__all__ = ["halo_attention"]

"""Backbones, registered with timm on import: one family, one file."""

from . import ela, halonet, ninformer, ulsam

__all__ = ["ela", "halonet", "ninformer", "ulsam"]

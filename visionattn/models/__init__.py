"""Backbones, registered with timm on import: one family, one file."""

from . import ela, halonet, ninformer, transnext, ulsam

__all__ = ["ela", "halonet", "ninformer", "transnext", "ulsam"]

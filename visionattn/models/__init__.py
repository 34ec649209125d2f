"""Backbones, registered with timm on import: one family, one file."""

from . import agent, ela, halonet, nat, ninformer, transnext, ulsam

__all__ = ["agent", "ela", "halonet", "nat", "ninformer", "transnext", "ulsam"]

"""Backbones, registered with timm on import: one family, one file."""

from . import agent, ela, graph_vit, halonet, inline, mala, nat, ninformer, transnext, ulsam

__all__ = ["agent", "ela", "graph_vit", "halonet", "inline", "mala", "nat", "ninformer", "transnext", "ulsam"]

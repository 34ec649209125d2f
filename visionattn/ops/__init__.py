"""Functions on tensors: no parameters, no state, no timm."""

from .halo import halo_attention

__all__ = ["halo_attention"]

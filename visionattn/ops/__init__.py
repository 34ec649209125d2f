"""Functions on tensors: no parameters, no state, no timm."""

from .halo import halo_attention
from .local import local_attention

__all__ = ["halo_attention", "local_attention"]

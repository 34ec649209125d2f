"""Aggregated (pixel-focused) attention of TransNeXt: neighbours and a pooled map under one softmax."""

from .api import aggregated_attention

__all__ = ["aggregated_attention"]

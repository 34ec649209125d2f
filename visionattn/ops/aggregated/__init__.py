"""Aggregated (pixel-focused) attention of TransNeXt: neighbours and a pooled map under one softmax."""

from .api import aggregated_attention, can_run_triton

__all__ = ["aggregated_attention", "can_run_triton"]

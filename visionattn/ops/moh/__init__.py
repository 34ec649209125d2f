"""Mixture-of-head attention (MoH, arXiv 2410.11842): every token picks the heads it uses."""

from .api import can_run_triton, moh_attention
from .routing import load_balance_loss, scaled_softmax, straight_through_gates, top_k_gates

__all__ = [
    "can_run_triton",
    "load_balance_loss",
    "moh_attention",
    "scaled_softmax",
    "straight_through_gates",
    "top_k_gates",
]

"""Halo attention (HaloNet, arXiv 2103.12731, section 3): blocks of queries, each over itself and a halo around it."""

from .api import can_run_triton, halo_attention, halo_attention_kv

__all__ = ["can_run_triton", "halo_attention", "halo_attention_kv"]

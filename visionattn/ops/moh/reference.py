"""Mixture-of-head attention as the released code computes it: every head, then its gate (the oracle)."""

import torch


def moh_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, N, H, D) queries, (B, M, H, D) keys and values; gates (B, N, H); bias (H, N, M) or (B, H, N, M)."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q * scale, k)
    if bias is not None:
        logits = logits + bias
    out = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(dim=-1), v)
    return out if gates is None else out * gates.unsqueeze(-1)

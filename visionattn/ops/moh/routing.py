"""Which heads a token uses, and by how much: the gates of mixture-of-head attention (arXiv 2410.11842, section 3.2).

The formulas are the released code's, which the weights need. It scales what the paper's equations 5 and 6 leave bare:
the gates of the shared heads sum to their number, the routed ones to k, the pair that weighs both to 2.
"""

import torch


def top_k_gates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of the routed heads (..., E) to (gates, probabilities, selected), each (..., E), at least float32.

    ``gates`` are the probabilities of the k largest, scaled to sum to k; 0 elsewhere. ``selected`` is 1 or 0, and a
    constant for autograd.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probs = logits.softmax(dim=-1, dtype=dtype)
    index = probs.detach().topk(k, dim=-1).indices
    selected = torch.zeros_like(probs).scatter(-1, index, 1.0)
    kept = probs * selected
    return k * kept / kept.sum(dim=-1, keepdim=True), probs, selected  # the sum is at least k / E


def scaled_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, times its length: gates that sum to the number of heads; at least float32."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.shape[-1] * logits.softmax(dim=-1, dtype=dtype)


def straight_through_gates(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`top_k_gates` whose gates are 1 for the selected heads; their gradient is that of the probabilities.

    What the paper continues training dense models with (section 4.3).
    """
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    probs = scores.softmax(dim=-1, dtype=dtype)
    index = probs.detach().topk(k, dim=-1).indices
    selected = torch.zeros_like(probs).scatter(-1, index, 1.0)
    return selected * (1.0 + (probs - probs.detach())), probs, selected


def load_balance_loss(probs: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Load-balance term (paper, equation 7, with the released factor E): E * sum_e mean(P_e) * mean(selected_e).

    Args:
        probs, selected: (..., E), averaged over all but the last axis. Uniform routing gives exactly k.
    """
    num_heads = probs.shape[-1]
    return num_heads * (probs.flatten(0, -2).mean(0) * selected.flatten(0, -2).mean(0)).sum()

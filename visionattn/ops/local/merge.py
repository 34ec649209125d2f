"""Attention over disjoint sets of keys, joined."""

import torch


def merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attention over disjoint sets of keys: ``lse = log sum_i exp lse_i``, ``out = sum_i exp(lse_i - lse) out_i``
    of outputs ``out_i``.

    Args:
        outs: outputs (B, N, H, D) of the same queries.
        lses: their natural log-sum-exps (B, H, N); -inf where a query saw no key of a set.

    Returns:
        The output in the dtype of ``outs[0]``, and the log-sum-exp. Differentiable in both.

    Raises:
        ValueError: if the lists' lengths differ, or are 0, or shapes disagree.
    """
    if not all(isinstance(parts, (list, tuple)) for parts in (outs, lses)):
        raise ValueError(f"merge got a {type(outs).__name__} and a {type(lses).__name__}: give two lists of tensors")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge got {len(outs)} outputs and {len(lses)} log-sum-exps: give one of each for every part")
    for o, lse in zip(outs, lses, strict=True):
        # a table (B, N, H), which others return, would broadcast unseen where N is H or a length is 1
        if o.dim() != 4 or o.shape != outs[0].shape or lse.shape != (o.shape[0], o.shape[2], o.shape[1]):
            raise ValueError(
                f"merge got an output {list(o.shape)} with log-sum-exps {list(lse.shape)}: give (batch, tokens, heads, "
                "channels), all of one shape, with (batch, heads, tokens)"
            )
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, 0)
    # a query that saw nothing anywhere: every weight is exp(-inf - 0) = 0
    weights = torch.exp(stacked - total.masked_fill(total == float("-inf"), 0.0))
    out = sum(o.to(w.dtype) * w.transpose(1, 2).unsqueeze(-1) for o, w in zip(outs, weights.unbind(0), strict=True))
    return out.to(outs[0].dtype), total

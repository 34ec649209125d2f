"""The public function of mixture-of-head attention: it checks its arguments and picks an implementation."""

import torch
import torch.nn.functional as F

from .reference import moh_attention_reference

BACKENDS = ("auto", "reference", "dense")


def moh_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention whose head h of token n is weighed by ``gates[..., n, h]``; 0 means that the token left it out.

    Args:
        q: queries (B, N, H, D), any strides.
        k, v: keys and values (B, M, H, D).
        gates: (B, N, H), or None for plain attention.
        scale: factor of q.k, D ** -0.5 by default.
        bias: added to the logits, (H, N, M) or (B, H, N, M).
        dropout_p: dropout of the attention weights.
        backend: ``'reference'``: eager, every logit in memory. ``'dense'``: PyTorch's fused attention for all heads,
            then the gates. ``'auto'``: what is fastest where it can run.

    Returns:
        (B, N, H, D) in q's dtype.

    Raises:
        ValueError: for an unknown backend, or shapes that disagree.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if not torch.jit.is_scripting():
        _check(q, k, v, gates, bias, backend)
    if backend == "reference" and dropout_p == 0.0:
        return moh_attention_reference(q, k, v, gates, factor, bias)
    mask = bias if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout_p, scale=factor
    ).transpose(1, 2)
    return out if gates is None else out * gates.unsqueeze(-1).to(out.dtype)


def _check(q, k, v, gates, bias, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}: give (B, N, H, D) and twice "
            "(B, M, H, D)"
        )
    if gates is not None and gates.shape != q.shape[:3]:
        raise ValueError(f"gates have shape {list(gates.shape)}: q needs {list(q.shape[:3])}")
    if bias is not None and bias.shape[-3:] != (q.shape[2], q.shape[1], k.shape[1]):
        expected = [q.shape[2], q.shape[1], k.shape[1]]
        raise ValueError(f"bias has shape {list(bias.shape)}: q and k need {expected}, or that for each of the batch")

"""Attention along edges in eager PyTorch: the oracle of ops/graph (Dwivedi & Bresson, arXiv 2012.09699)."""

import torch

CLAMP = 5.0  # logits are clamped to +-5 before the exponential, as released; the paper says after it
EPSILON = 1e-6  # in the denominator of the layer with edge features only, as released


def edge_scores(
    q: torch.Tensor, k: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, e: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of edges by channel, (E, H, D): k_src * q_dst / sqrt(D), times e where given (eqs. 3 and 12)."""
    scores = k[src] * q[dst] * float(q.shape[-1]) ** -0.5
    return scores if e is None else scores * e


def edge_weights(scores: torch.Tensor, dst: torch.Tensor, num_nodes: int, eps: float) -> torch.Tensor:
    """Softmax of (E, H, D) scores, summed over D, at each destination: (E, H), float32 or wider.

    No maximum is subtracted; the clamp bounds the exponentials instead. A node without edges has denominator 0, which
    no edge reads.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    w = scores.sum(-1).clamp(-CLAMP, CLAMP).exp()
    total = w.new_zeros(num_nodes, w.shape[1]).index_add(0, dst, w)
    return w / (total + eps)[dst]


def graph_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    e: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (N, H, D) and the scores by channel (E, H, D). A node without incoming edges gets 0."""
    scores = edge_scores(q, k, src, dst, e)
    weights = edge_weights(scores, dst, q.shape[0], eps)
    messages = weights[..., None] * v[src]
    out = messages.new_zeros(v.shape).index_add(0, dst, messages)
    return out.to(v.dtype), scores


def neighbour_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, neighbour: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The same on graphs of one degree, in dense tensors: nothing is scattered, and TorchScript can compile it.

    Args:
        q, k, v: (B, N, H, D).
        neighbour: (N, K) or (B, N, K) integers, the nodes that each node attends to.
        valid: (N, K) or (B, N, K) booleans, False for places that pad the neighbours of a node; None where none do.

    Returns:
        (B, N, H, D). A node without valid neighbours gets 0.
    """
    B, N, H, D = k.shape
    K = neighbour.shape[-1]
    kv = torch.cat([k, v], dim=-1)
    if neighbour.dim() == 2:
        gathered = kv[:, neighbour.reshape(-1)].reshape(B, q.shape[1], K, H, 2 * D)
    else:
        index = neighbour.reshape(B, -1, 1).expand(-1, -1, H * 2 * D)
        gathered = kv.reshape(B, N, H * 2 * D).gather(1, index).reshape(B, q.shape[1], K, H, 2 * D)
    k, v = gathered.split([D, D], dim=-1)
    logits = (q[:, :, None] * k).sum(-1) * float(D) ** -0.5  # (B, N, K, H)
    if logits.dtype == torch.float16 or logits.dtype == torch.bfloat16:  # what TorchScript understands
        logits = logits.float()
    w = logits.clamp(-5.0, 5.0).exp()
    if valid is not None:
        w = w * valid[..., None].to(w.dtype)
        w = w / w.sum(2, keepdim=True).clamp_min(1e-30)
    else:
        w = w / w.sum(2, keepdim=True)
    return (w[..., None].to(v.dtype) * v).sum(2)

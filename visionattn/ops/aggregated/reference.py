"""Aggregated attention in eager PyTorch: the oracle of the fused kernels. TransNeXt (CVPR 2024, arXiv 2311.17132)."""

import torch
import torch.nn.functional as F


def window_validity(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """(H * W, window ** 2) booleans: which neighbours of a token (row by row around it) lie inside the map."""
    reach = window // 2
    step = torch.arange(window, device=device) - reach
    rows = torch.arange(height, device=device)[:, None] + step[None]
    cols = torch.arange(width, device=device)[:, None] + step[None]
    rows_in = (rows >= 0) & (rows < height)
    cols_in = (cols >= 0) & (cols < width)
    inside = rows_in[:, None, :, None] & cols_in[None, :, None, :]
    return inside.reshape(height * width, window * window)


def aggregated_attention_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    kv_pool: torch.Tensor,
    query_embedding: torch.Tensor,
    tau: torch.Tensor,
    bias_local: torch.Tensor,
    bias_pool: torch.Tensor,
    tokens: torch.Tensor,
    token_bias: torch.Tensor,
    height: int,
    width: int,
    window: int,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """See :func:`visionattn.ops.aggregated.aggregated_attention`; no unfolded keys or values, one shift at a time."""
    B, N, heads, dim = q.shape
    k, v, k_pool, v_pool = kv[:, :, 0], kv[:, :, 1], kv_pool[:, :, 0], kv_pool[:, :, 1]
    reach = window // 2
    inside = window_validity(height, width, window, q.device)
    scale = torch.log((inside.sum(dim=1) + k_pool.shape[1]).to(q.dtype))

    unit = F.normalize(q, dim=-1)
    # parameters may be float32 beside 16-bit q, kv: sums are made in the wider type, products in q's
    scaled = ((unit + query_embedding) * (tau[:, None] * scale[:, None, None])).to(q.dtype)
    pad = [0, 0, 0, 0, reach, reach, reach, reach]
    k_map = F.pad(F.normalize(k, dim=-1).reshape(B, height, width, heads, dim), pad)
    v_map = F.pad(v.reshape(B, height, width, heads, dim), pad)

    local = []
    for i in range(window):
        for j in range(window):
            near = k_map[:, i : i + height, j : j + width].reshape(B, N, heads, dim)
            local.append((scaled * near).sum(dim=-1))
    logits = torch.stack(local, dim=-1) + bias_local
    logits = logits.masked_fill(~inside[:, None, :], float("-inf"))
    pooled = torch.einsum("bnhd,bphd->bnhp", scaled, F.normalize(k_pool, dim=-1)) + bias_pool.transpose(0, 1)
    weights = torch.cat([logits, pooled], dim=-1).softmax(dim=-1)
    weights = F.dropout(weights, dropout_p, dropout_p > 0.0)

    learned = torch.einsum("bnhd,hdj->bnhj", unit, tokens.to(q.dtype)) + token_bias
    near = (weights[..., : window * window] + learned).to(q.dtype)
    weights = weights.to(q.dtype)
    out = torch.einsum("bnhp,bphd->bnhd", weights[..., window * window :], v_pool)
    for i in range(window):
        for j in range(window):
            shifted = v_map[:, i : i + height, j : j + width].reshape(B, N, heads, dim)
            out = out + near[..., i * window + j].unsqueeze(-1) * shifted
    return out

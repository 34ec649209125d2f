"""Halo attention in eager PyTorch: the formula of the paper, and the oracle of the kernels."""

import torch
import torch.nn.functional as F


def relative_rows(table: torch.Tensor, queries: int, window: int, rel_step: int) -> torch.Tensor:
    """``out[r, R] = table[R - rel_step * r + window - 1]``: (2 * window - 1, D) -> (queries, window, D)."""
    r = torch.arange(queries, device=table.device)
    key = torch.arange(window, device=table.device)
    return table[key[None, :] - rel_step * r[:, None] + (window - 1)]


def halo_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    mask_border: bool,
    scale: float,
    rel_scale: float,
    rel_step: int,
) -> torch.Tensor:
    """See :func:`visionattn.ops.halo_attention`; every window is materialised here.

    ``logit[(r, c), (R, S)] = scale * q.k + rel_scale * (q . Th[R - r + win - 1] + q . Tw[S - c + win - 1])``
    """
    B, H, W, heads, dim = k.shape
    Hq, Wq = q.shape[1], q.shape[2]
    dim_v = v.shape[-1]
    win = block_size + 2 * halo_size
    bq = block_size // stride
    rows, cols = (H + block_size - 1) // block_size, (W + block_size - 1) // block_size

    q = F.pad(q, [0, 0, 0, 0, 0, cols * bq - Wq, 0, rows * bq - Hq])
    q = q.reshape(B, rows, bq, cols, bq, heads, dim).permute(0, 5, 1, 3, 2, 4, 6)  # B, heads, rows, cols, bq, bq, dim
    pad = [0, 0, 0, 0, halo_size, halo_size + cols * block_size - W, halo_size, halo_size + rows * block_size - H]
    k = F.pad(k, pad).unfold(1, win, block_size).unfold(2, win, block_size)  # B, rows, cols, heads, dim, win, win
    v = F.pad(v, pad).unfold(1, win, block_size).unfold(2, win, block_size)
    k = k.permute(0, 3, 1, 2, 4, 5, 6).reshape(B, heads, rows, cols, dim, win * win)
    v = v.permute(0, 3, 1, 2, 5, 6, 4).reshape(B, heads, rows, cols, win * win, dim_v)

    logits = (q.reshape(B, heads, rows, cols, bq * bq, dim) @ k) * scale
    rel_h = torch.einsum("bnijrcd,rRd->bnijrcR", q, relative_rows(rel_height, bq, win, rel_step))
    rel_w = torch.einsum("bnijrcd,cSd->bnijrcS", q, relative_rows(rel_width, bq, win, rel_step))
    rel = rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)
    logits = logits + rel.reshape(B, heads, rows, cols, bq * bq, win * win) * rel_scale
    if mask_border:
        key = torch.arange(win, device=q.device) - halo_size
        key_y = torch.arange(rows, device=q.device)[:, None] * block_size + key
        key_x = torch.arange(cols, device=q.device)[:, None] * block_size + key
        valid_y, valid_x = (key_y >= 0) & (key_y < H), (key_x >= 0) & (key_x < W)
        valid = valid_y[:, None, :, None] & valid_x[None, :, None, :]  # rows, cols, win, win
        logits = logits.masked_fill(~valid.reshape(rows, cols, 1, win * win), float("-inf"))

    out = logits.softmax(dim=-1) @ v  # B, heads, rows, cols, bq * bq, dim_v
    out = out.reshape(B, heads, rows, cols, bq, bq, dim_v).permute(0, 2, 4, 3, 5, 1, 6)
    return out.reshape(B, rows * bq, cols * bq, heads, dim_v)[:, :Hq, :Wq]

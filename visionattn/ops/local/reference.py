"""Local attention in eager PyTorch: the token mask, in chunks of queries. The oracle of every other backend."""

import math

import torch

from .patterns import Grid, Neighborhood, Pattern, coordinates

_CHUNK = 2**25  # logits at a time


def bias_index(pattern: Neighborhood, grid: Grid, queries: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
    """Per axis, the row of the bias table of a (query, key) pair: key - query + window - 1 in steps of the dilation.

    Rows of pairs that don't see each other are clamped into the table.
    """
    rows = []
    for axis, q, k in zip(pattern.axes(grid), coordinates(queries, grid), coordinates(keys, grid), strict=True):
        offset = torch.div(k - q, axis.dilation, rounding_mode="floor") + axis.window - 1
        rows.append(offset.clamp(0, 2 * axis.window - 2))
    return rows


def visible_keys(
    pattern: Pattern, grid: Grid, text: int, text_first: bool, extra: int, start: int, stop: int, device
) -> torch.Tensor:
    """Boolean (stop - start, text + grid + extra): rows of the joint mask, without text lengths."""
    n = math.prod(grid)
    first = text if text_first else 0  # where the grid begins
    query = torch.arange(start, stop, device=device)
    is_grid = (query >= first) & (query < first + n)
    mask = torch.ones(stop - start, text + n + extra, dtype=torch.bool, device=device)
    mask[:, text + n :] = is_grid[:, None]
    low, high = max(start, first), min(stop, first + n)
    if low < high:
        mask[low - start : high - start, first : first + n] = pattern.mask(grid, low - first, high - first, device)
    return mask


def reference(
    q, k, v, grid, pattern, text, text_first, text_lengths, extra_k, extra_v, bias, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, N, H, Dv) and log-sum-exp (B, H, N), float32 or wider. See :func:`local_attention`.

    ``out[i] = sum_j softmax_j(scale * q_i . k_j + bias[offset(i, j)] + mask[i, j]) v_j``
    """
    B, N, heads, _ = q.shape
    extra = 0 if extra_k is None else extra_k.shape[1]
    if extra_k is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    groups = heads // k.shape[2]
    k = k.permute(0, 2, 3, 1).repeat_interleave(groups, 1)  # B, heads, D, N + extra
    v = v.permute(0, 2, 1, 3).repeat_interleave(groups, 1)
    first = text if text_first else 0
    n = math.prod(grid)
    padded = _padded_text(text_lengths, text, 0 if text_first else n, N + extra, q.device)

    outs, lses = [], []
    step = max(1, min(N, _CHUNK // (B * heads * (N + extra))))
    for start in range(0, N, step):
        stop = min(N, start + step)
        mask = visible_keys(pattern, grid, text, text_first, extra, start, stop, q.device)
        logits = (q[:, start:stop].transpose(1, 2) @ k) * scale
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if bias is not None:
            logits = logits + _bias(bias.to(logits.dtype), pattern, grid, start, stop, first, N + extra, q.device)
        logits = logits.masked_fill(~mask, float("-inf"))
        if padded is not None:
            logits = logits.masked_fill(padded[:, None, None, :], float("-inf"))
        outs.append((logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _padded_text(text_lengths, text: int, first: int, keys: int, device) -> torch.Tensor | None:
    """Boolean (B, keys): text that a batch entry doesn't have."""
    if text_lengths is None:
        return None
    position = torch.arange(keys, device=device) - first
    return (position >= text_lengths[:, None].to(device)) & (position < text)


def _bias(bias, pattern, grid, start, stop, first, keys, device) -> torch.Tensor:
    """(heads, stop - start, keys): the bias of grid pairs, 0 elsewhere."""
    n = math.prod(grid)
    out = bias.new_zeros(bias.shape[0], stop - start, keys)
    low, high = max(start, first), min(stop, first + n)
    if low < high:
        queries = torch.arange(low - first, high - first, device=device)[:, None]
        rows = bias_index(pattern, grid, queries, torch.arange(n, device=device)[None, :])
        out[:, low - start : high - start, first : first + n] = bias[(slice(None), *rows)]
    return out

"""Attention rollout: how much of each image place the tokens of the last layer hold, if attention were all.

Abnar and Zuidema, 'Quantifying Attention Flow in Transformers' (ACL 2020), arXiv 2005.00928, section 3: with the
residual connection, a layer moves (A + I) / 2, and layers multiply.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .capture import Layers, attention_maps
from .result import AttentionMap, Segment, cover, find, sizes, spread


@dataclass
class Rollout:
    """Shares of the first layer's places in the last layer's tokens.

    Attributes:
        shares: (B, tokens of the last layer, tokens of the first layer); rows sum to 1.
        queries, keys: segments of the two.
        layers: names of the layers that were multiplied.
    """

    shares: torch.Tensor
    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...]
    layers: list[str]

    def on_image(self) -> torch.Tensor:
        """(B, H, W): the class token's row, or where there is none the mean over the tokens."""
        start, grid = find(self.keys, "grid")
        row = self.shares[:, 0] if find(self.queries, "prefix") else self.shares.mean(dim=1)
        return row[:, start : start + grid.size].unflatten(1, grid.shape)


def rollout(model: nn.Module, x: Any, layers: Layers | None = None, *, dtype: torch.dtype = torch.float32) -> Rollout:
    """Multiplies the maps (mean over heads) of the chosen layers, in their order, each as (A + I) / 2.

    Ours, where the paper's models had nothing like it: between two grids (pyramids), a coarser token begins as the mean
    of the tokens that it covers; weights of a pooled map are spread over its cells; weights beyond the image are left
    out and rows made to sum to 1 again; of signed maps the absolute values count. Convolutions are not seen.

    Args:
        model, x, layers, dtype: of :func:`visionattn.attention_maps`; layers without a map of the image are left out.

    Raises:
        ValueError: where no chosen layer has queries and keys on a grid.
    """
    state: list[Rollout] = []

    def step(amap: AttentionMap) -> str | None:
        grids = find(amap.queries, "grid"), find(amap.keys, "grid") or find(amap.keys, "pooled")
        if amap.kind in ("mask", "gate") or None in grids or amap.rows is not None:
            return None
        weights, keys = _square(amap)
        if not state:
            eye = torch.eye(sizes(keys), dtype=weights.dtype, device=weights.device)
            state.append(Rollout(eye.expand(len(weights), -1, -1), keys, keys, []))
        last = state[0]
        before = _carry(last.shares, last.queries, keys)
        moved = weights @ before if last.layers else weights
        last.shares = (moved + _carry(before, keys, amap.queries)) / 2
        last.queries = amap.queries
        last.layers.append(amap.layer)
        return amap.layer

    attention_maps(model, x, layers, heads="mean", dtype=dtype, values=False, each=step)
    if not state:
        raise ValueError("rollout: no chosen layer has queries and keys on a grid")
    return state[0]


def _square(amap: AttentionMap) -> tuple[torch.Tensor, tuple[Segment, ...]]:
    """Weights (B, queries, keys) with the keys as prefix and grid only, rows summing to 1; and those segments."""
    weights = amap.map[:, 0].abs() if amap.kind == "signed" else amap.map[:, 0]
    prefix, place, pooled = (find(amap.keys, name) for name in ("prefix", "grid", "pooled"))
    parts, keys = [], []
    if prefix is not None:
        parts.append(weights[..., prefix[0] : prefix[0] + prefix[1].size])
        keys.append(prefix[1])
    grid = place[1] if place is not None else Segment("grid", amap.query_grid)
    onto = weights.new_zeros(*weights.shape[:2], grid.size)
    if place is not None:
        onto = onto + weights[..., place[0] : place[0] + grid.size]
    if pooled is not None:
        cells = weights[..., pooled[0] : pooled[0] + pooled[1].size].unflatten(-1, pooled[1].shape)
        onto = onto + spread(cells, grid.shape).flatten(-2)
    weights = torch.cat([*parts, onto], dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30), (*keys, grid)


def _carry(shares: torch.Tensor, old: tuple[Segment, ...], new: tuple[Segment, ...]) -> torch.Tensor:
    """Shares (B, old tokens, N) of the old tokens as those of new ones, each of which begins as a mean of old ones."""
    if [s for s in old if s.name in ("prefix", "grid")] == list(new):
        return shares
    out = shares.new_zeros(sizes(new), sizes(old))
    a, b = find(old, "grid"), find(new, "grid")
    bins = [_resize(f, c, shares) for f, c in zip(a[1].shape, b[1].shape, strict=True)]
    out[b[0] : b[0] + b[1].size, a[0] : a[0] + a[1].size] = torch.kron(bins[0], bins[1])
    prefix = find(new, "prefix")
    if prefix is not None:
        count, had = prefix[1].size, find(old, "prefix")
        if had is not None and had[1].size == count:
            out[:count, :count] = torch.eye(count, dtype=shares.dtype, device=shares.device)
        else:  # a token that had no place before begins as the mean of all
            out[:count, a[0] : a[0] + a[1].size] = 1.0 / a[1].size
    return out @ shares


def _resize(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """(new, old): means of the bins of adaptive pooling; a finer grid repeats."""
    if new <= old:
        return cover(old, new, like)
    index = torch.arange(new, device=like.device) * old // new
    return torch.nn.functional.one_hot(index, old).to(like.dtype)

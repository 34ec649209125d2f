"""Token merging on a grid, as Stable Diffusion's patches do it (ToMeSD, arXiv 2303.17604, section 4).

Every cell of the grid gives one destination; the sources, all other tokens, that resemble a destination most are
averaged into it. :func:`match_tokens` decides, :func:`merge_tokens` and :func:`unmerge_tokens` carry it out; the same
decision serves any number of merged tokens.
"""

import math
from typing import NamedTuple

import torch

_SCORES = 1 << 27  # of one product of sources and destinations; more come in parts


class Matching(NamedTuple):
    """Who would be merged into whom.

    ``destinations`` (D,) are tokens, the same in the whole batch; ``sources`` (B, S) the other tokens, best match
    first; ``partners`` (B, S) each source's position in ``destinations``.
    """

    destinations: torch.Tensor
    sources: torch.Tensor
    partners: torch.Tensor


def destination_tokens(
    grid: tuple[int, int], cell: tuple[int, int], choice: torch.Tensor | None = None, device=None
) -> torch.Tensor:
    """One token of every whole cell of the grid, (D,), cells row by row.

    Args:
        grid: rows and columns of the tokens; a rest at the bottom and at the right belongs to no cell.
        cell: rows and columns of a cell.
        choice: (grid rows // cell rows, grid columns // cell columns), which token of its cell, counted row by row; the
            top left one where None.
    """
    (H, W), (h, w) = grid, cell
    rows = torch.arange(H // h, device=device)[:, None] * h
    cols = torch.arange(W // w, device=device)[None, :] * w
    if choice is not None:
        rows, cols = rows + choice // w, cols + choice % w
    return (rows * W + cols).flatten()


@torch.no_grad()
def match_tokens(
    x: torch.Tensor, grid: tuple[int, int], cell: tuple[int, int], choice: torch.Tensor | None = None
) -> Matching:
    """Finds each source's most similar destination by the cosine of tokens x (B, H * W, C).

    Args:
        grid, cell, choice: see :func:`destination_tokens`; a grid smaller than a cell has no sources.

    Raises:
        ValueError: if the tokens are not the grid's.
    """
    B, N, _ = x.shape
    if math.prod(grid) != N:
        raise ValueError(f"match_tokens: {N} tokens are no grid of {grid[0]} x {grid[1]}: give the tokens' own grid")
    into = destination_tokens(grid, cell, choice, x.device)
    if len(into) == 0:
        none = torch.empty(B, 0, dtype=torch.long, device=x.device)
        return Matching(into, none, none)
    taken = torch.zeros(N, dtype=torch.uint8, device=x.device).index_fill(0, into, 1)
    others = taken.argsort(stable=True)[: N - len(into)]  # raster order, and no wait for the GPU
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    targets = unit[:, into].transpose(1, 2)
    best, partners = [], []
    for part in others.split(max(_SCORES // (B * len(into)), 1)):
        values, indices = (unit[:, part] @ targets).max(dim=-1)
        best.append(values)
        partners.append(indices)
    order = torch.cat(best, dim=1).argsort(dim=1, descending=True, stable=True)
    return Matching(into, others[order], torch.cat(partners, dim=1).gather(1, order))


def merge_tokens(x: torch.Tensor, matching: Matching, merged: int) -> torch.Tensor:
    """The first ``merged`` sources averaged into their destinations, these included in the means.

    Returns:
        (B, N - merged, C): the other sources, then the destinations; x (B, N, C) itself if nothing is merged.
    """
    if merged == 0:
        return x
    gone, kept = matching.sources[:, :merged], matching.sources[:, merged:]
    partners = matching.partners[:, :merged]
    into = x[:, matching.destinations].scatter_reduce(1, _wide(partners, x), x.gather(1, _wide(gone, x)), "mean")
    return torch.cat([x.gather(1, _wide(kept, x)), into], dim=1)


def unmerge_tokens(y: torch.Tensor, matching: Matching, merged: int) -> torch.Tensor:
    """Tokens (B, N, C) from those of :func:`merge_tokens`: a merged source takes its destination's value."""
    if merged == 0:
        return y
    B, _, C = y.shape
    sources, into = matching.sources, matching.destinations
    kept, values = y.split([sources.shape[1] - merged, len(into)], dim=1)
    out = y.new_empty(B, sources.shape[1] + len(into), C)
    out[:, into] = values
    out.scatter_(1, _wide(sources[:, merged:], y), kept)
    gone = values.gather(1, _wide(matching.partners[:, :merged], y))
    return out.scatter_(1, _wide(sources[:, :merged], y), gone)


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])

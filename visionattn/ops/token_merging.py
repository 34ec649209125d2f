"""Token merging on a grid, as Stable Diffusion's patches do it (ToMeSD, arXiv 2303.17604, section 4).

Every cell of the grid gives one destination; the sources, all other tokens, that resemble a destination most are
averaged into it. :func:`match_tokens` decides, :func:`merge_tokens` and :func:`unmerge_tokens` carry it out; the same
decision serves any number of merged tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_SCORES = 1 << 27  # of one product of tokens and destinations; more come in parts


class Matching(NamedTuple):
    """Who would be merged into whom.

    ``destinations`` (D,) are tokens in rising order, the same in the whole batch; ``order`` (B, N) all tokens: the
    sources, best match first, then the destinations; ``partners`` (B, N) each one's position in ``destinations``, in
    that order.
    """

    destinations: torch.Tensor
    order: torch.Tensor
    partners: torch.Tensor

    @property
    def sources(self) -> int:
        """How many tokens are no destination, and so can be merged."""
        return self.order.shape[1] - self.destinations.shape[0]


class Seats(NamedTuple):
    """Where every token lies once some are merged: ``places`` (B, N) in a sequence of ``left`` tokens."""

    places: torch.Tensor | None  # None: nothing is merged
    left: int


def destination_tokens(
    grid: tuple[int, int], cell: tuple[int, int], choice: torch.Tensor | None = None, device=None
) -> torch.Tensor:
    """One token of every whole cell of the grid, in rising order, (D,) or (..., D).

    Args:
        grid: rows and columns of the tokens; a rest at the bottom and at the right belongs to no cell.
        cell: rows and columns of a cell.
        choice: (..., grid rows // cell rows, grid columns // cell columns), which token of its cell, counted row by
            row; the top left one where None.
    """
    (H, W), (h, w) = grid, cell
    rows = torch.arange(H // h, device=device)[:, None] * h
    cols = torch.arange(W // w, device=device)[None, :] * w
    if choice is None:
        return (rows * W + cols).flatten()
    choice = choice.long()
    return ((rows + choice // w) * W + cols + choice % w).flatten(-2).sort(dim=-1).values


@torch.no_grad()
def match_tokens(x: torch.Tensor, destinations: torch.Tensor) -> Matching:
    """Finds each source's most similar destination by the cosine of tokens x (B, N, C).

    Args:
        destinations: (D,) tokens, of :func:`destination_tokens`; without any there are no partners.
    """
    B, N, C = x.shape
    if len(destinations) == 0:
        order = torch.arange(N, device=x.device).expand(B, N)
        return Matching(destinations, order[:, :0], order[:, :0])
    unit = F.rms_norm(x, (C,), eps=torch.finfo(torch.float32).tiny)  # C ** 0.5 times as long, which no order feels
    targets = unit.index_select(1, destinations).transpose(1, 2)
    rows = max(_SCORES // (B * len(destinations)), 1)
    found = [(part @ targets).max(dim=-1) for part in unit.split(rows, dim=1)]
    best, partners = found[0] if len(found) == 1 else (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    best.index_fill_(1, destinations, -torch.inf)  # to the end, in rising order
    order = best.argsort(dim=1, descending=True, stable=True)
    return Matching(destinations, order, partners.gather(1, order))


def seats(matching: Matching, merged: int) -> Seats:
    """Every token's place once the first ``merged`` sources are merged: other sources first, then destinations."""
    order, partners = matching.order, matching.partners
    left = order.shape[1] - merged
    if merged == 0:
        return Seats(None, left)
    kept = torch.arange(left, device=order.device).expand(len(order), left)
    first = matching.sources - merged  # the first destination's place
    into = partners[:, :merged] + first if first else partners[:, :merged]
    places = torch.cat([into, kept], dim=1)
    return Seats(torch.empty_like(places).scatter_(1, order, places), left)


def merge_tokens(x: torch.Tensor, seats: Seats) -> torch.Tensor:
    """Tokens x (B, N, C) as (B, left, C): the means of those that share a seat, summed in float32 at least."""
    if seats.places is None:
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_zeros(len(x), seats.left, x.shape[2], dtype=wide)
    sums = sums.scatter_add(1, _wide(seats.places, x), x.to(wide))
    counts = x.new_zeros(len(x), seats.left, 1, dtype=wide).scatter_(1, seats.places.unsqueeze(2), 1.0, reduce="add")
    return (sums / counts).to(x.dtype)


def unmerge_tokens(y: torch.Tensor, seats: Seats) -> torch.Tensor:
    """Tokens (B, N, C) from those of :func:`merge_tokens`: a merged source takes its destination's value."""
    return y if seats.places is None else y.gather(1, _wide(seats.places, y))


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])

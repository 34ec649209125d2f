"""Where the grid and the text lie in a transformer's joint sequence."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """One call's token sequence: [text | grid | extra], or [grid | extra | text].

    Args:
        grid: lengths of the image's or video's axes, in tokens; rows before columns, frames before rows.
        text: text tokens of a joint sequence.
        text_first: whether text comes before the grid.
        extra: tokens directly after the grid that all see and that see all (reference images).
        padded_text: whether text may be padding behind ``text_lengths`` (of the session, a tensor).
    """

    grid: tuple[int, ...]
    text: int = 0
    text_first: bool = True
    extra: int = 0
    padded_text: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    def role(self, queries: int, keys: int) -> str | None:
        """What a call with so many queries and keys is.

        ``'joint'``: all; ``'image'``: all but text; ``'grid'``: the grid without extra tokens that it has elsewhere;
        None: another attention.
        """
        if queries != keys:
            return None
        if queries == self.tokens + self.extra + self.text:
            return "joint"
        if self.text and queries == self.tokens + self.extra:
            return "image"
        return "grid" if self.extra and queries == self.tokens else None


class GridError(ValueError):
    """The tokens of a call do not lie on a grid; the layer stays dense, with this reason in the report."""


def grid_of_ids(ids: torch.Tensor, rows: int, cols: int, frames: int | None = None) -> tuple[int, ...]:
    """The grid of position ids (N, columns): lengths along the columns called frames, rows and cols.

    Reads the ids, once per distinct tensor: a GPU waits for it.

    Raises:
        GridError: for ids that are not a whole raster.
    """
    ids = ids.detach()
    picked = ids[:, [c for c in (frames, rows, cols) if c is not None]].to("cpu", torch.float64)
    low, high = picked.amin(0), picked.amax(0)
    grid = tuple(int(n) for n in (high - low + 1).tolist())
    if math.prod(grid) != len(ids):
        raise GridError(f"{len(ids)} position ids are no {' x '.join(map(str, grid))} raster")
    expected = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(len(ids), -1)
    if not torch.equal(picked - low, expected):
        raise GridError(f"{len(ids)} position ids are not in raster order")
    return grid

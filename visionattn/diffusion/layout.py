"""Where the grid and the text lie in a transformer's joint sequence."""

import itertools
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

    Pipelines hand ids over in the network's type: bfloat16 knows no odd number above 256, so an axis's length is how
    far the ids of the axes outside of it stay the same, and the raster is compared as that type rounds it. Reads the
    ids, once per distinct tensor: a GPU waits for it.

    Raises:
        GridError: for ids that are not a whole raster.
    """
    picked = ids.detach()[:, [c for c in (frames, rows, cols) if c is not None]].to("cpu")
    runs = [len(picked)]
    for axes in range(1, picked.shape[1]):
        changes = (picked[:, :axes] != picked[0, :axes]).any(dim=1)
        runs.append(int(changes.int().argmax()) if changes.any() else len(picked))
    runs.append(1)
    grid = tuple(outer // inner for outer, inner in itertools.pairwise(runs))
    if math.prod(grid) != len(ids):
        raise GridError(f"{len(ids)} position ids are no {' x '.join(map(str, grid))} raster")
    expected = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(len(ids), -1)
    if not torch.equal(picked, (expected + picked[0].double()).to(picked.dtype)):
        raise GridError(f"{len(ids)} position ids are not in raster order")
    return grid

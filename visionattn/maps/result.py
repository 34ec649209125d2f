"""What :func:`visionattn.attention_maps` returns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

KINDS = ("softmax", "signed", "mask", "gate")


class Segment(NamedTuple):
    """A part of a sequence: ``'prefix'`` (class and register tokens), ``'grid'`` (the map's tokens, row by row),
    ``'pooled'`` (a smaller map), ``'padding'`` and ``'outside'`` (places beyond the image), or ``'tokens'``."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def sizes(segments: tuple[Segment, ...]) -> int:
    return sum(s.size for s in segments)


def find(segments: tuple[Segment, ...], name: str) -> tuple[int, Segment] | None:
    """Where a segment begins, and the segment; None where there is none of that name."""
    start = 0
    for segment in segments:
        if segment.name == name:
            return start, segment
        start += segment.size
    return None


@dataclass
class Explanation:
    """What a layer's explainer (:func:`visionattn.maps.register_map`) says: how to compute rows of its map, and how
    the map makes the layer's output.

    Args:
        kind: one of :data:`KINDS`.
        rows: of query indices (n,) int64 to weights (B, heads, n, keys). None for a mask or a gate.
        heads: heads of the map.
        queries, keys: segments of the two sequences, in their order.
        values: (B, heads, keys, D); for a mask or a gate what it multiplies, shaped like the layer's output.
        gates: (B, heads, queries), a factor of each head's output, or None.
        learned: rows of a second map which is added to the first (the same shapes), or None.
        added, multiplied: (B, queries, heads * D) by name: terms of the output beside the product, and factors after.
        mask: (B, groups, H, W), or (B, N, C) for gates of tokens.
    """

    kind: str
    rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    heads: int = 1
    batch: int = 1
    queries: tuple[Segment, ...] = ()
    keys: tuple[Segment, ...] = ()
    values: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    learned: Callable[[torch.Tensor], torch.Tensor] | None = None
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    multiplied: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    edges: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@dataclass
class AttentionMap:
    """The map from query to key of one layer, in one call of it.

    Attributes:
        layer: name of the module in the model.
        mechanism: the module's class.
        kind: ``'softmax'`` (rows of the map are not negative and sum to 1), ``'signed'`` (implied weights of a linear
            attention, which may be negative), ``'mask'`` (one factor for each place and group of channels), ``'gate'``
            (one for each place and channel).
        map: (B, heads, queries, keys), or (B, 1, queries, keys) with ``heads='mean'``. Masks (B, groups, H, W). Gates
            (B, C, H, W), or (B, N, C) of tokens whose grid is not known.
        queries, keys: the :class:`Segment` of both sequences, in the order of the map's axes. Only the chosen rows of
            the queries are there where ``rows`` is not None.
        rows: indices (n,) of the queries that the map has, None for all.
        values: (B, heads, keys, D), what the map is applied to; None where they were not kept.
        gates: (B, heads, queries), factors of each head's output (mixture of heads); the map is without them.
        learned: a second map, of the same shape, added to the first (TransNeXt's learnable tokens); it is signed and
            no part of the softmax.
        added: terms of the output beside the product, by name (``'depthwise'``), (B, queries, heads * D).
        multiplied: factors of the output, by name (MALA's ``'gate'``), likewise.
        factors: what the map is a product of, where it is one: ``'spread'`` (B, heads, queries, agents) and
            ``'gather'`` (B, heads, agents, keys) of agent attention.
        edges: (src, dst, weights (E, heads)) of a graph.
    """

    layer: str
    mechanism: str
    kind: str
    map: torch.Tensor
    queries: tuple[Segment, ...] = ()
    keys: tuple[Segment, ...] = ()
    rows: torch.Tensor | None = None
    values: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    learned: torch.Tensor | None = None
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    multiplied: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    edges: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def query_grid(self) -> tuple[int, ...] | None:
        """(H, W) of the queries' map, None where the layer has none."""
        found = find(self.queries, "grid")
        return None if found is None else found[1].shape

    @property
    def key_grid(self) -> tuple[int, ...] | None:
        """(H, W) of the keys' map, None where the layer has none."""
        found = find(self.keys, "grid") or find(self.keys, "pooled")
        return None if found is None else found[1].shape

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens at the beginning of the queries."""
        found = find(self.queries, "prefix")
        return 0 if found is None else found[1].size

    def apply(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The map applied to the values: what enters the layer's output projection (docs/maps.md, per mechanism).

        Args:
            values: in place of the layer's own.

        Returns:
            (B, queries, heads * D); for masks and gates shaped like the values.

        Raises:
            ValueError: where the heads were averaged, or the values not kept.
        """
        values = self.values if values is None else values
        if values is None:
            raise ValueError(f"{self.layer}: the values are not here: ask for maps without heads='mean', values=True")
        if self.kind in ("mask", "gate"):
            out = values * self.map.repeat_interleave(values.shape[1] // self.map.shape[1], dim=1)
        else:
            weights = self.map if self.learned is None else self.map + self.learned
            if weights.shape[1] != values.shape[1]:
                raise ValueError(f"{self.layer}: {weights.shape[1]} heads of the map, {values.shape[1]} of the values")
            out = weights @ values
            if self.gates is not None:
                out = out * self.gates.unsqueeze(-1)
            out = out.transpose(1, 2).flatten(2)
        for term in self.added.values():
            out = out + term
        for factor in self.multiplied.values():
            out = out * factor
        return out

    def on_image(self) -> torch.Tensor:
        """How the rows lie on the keys' map: (B, heads, queries, H, W); a mask as (B, groups, 1, H, W).

        Weights of a pooled map are spread evenly over the places that each of its cells covers. What falls on prefix
        tokens and beyond the image is left out, so these sums may be less than 1; ``learned`` weights are too.

        Raises:
            ValueError: where the layer has no map.
        """
        if self.kind in ("mask", "gate"):
            if self.map.ndim != 4:
                raise ValueError(f"{self.layer}: the gate's tokens lie on no known grid")
            return self.map.unsqueeze(2)
        weights = self.map
        place, pooled = find(self.keys, "grid"), find(self.keys, "pooled")
        if place is None and pooled is None:
            raise ValueError(
                f"{self.layer}: its keys ({', '.join(s.name for s in self.keys)}) lie on no map of an image"
            )
        out = None
        if place is not None:
            out = weights[..., place[0] : place[0] + place[1].size].unflatten(-1, place[1].shape)
        if pooled is not None:
            cells = weights[..., pooled[0] : pooled[0] + pooled[1].size].unflatten(-1, pooled[1].shape)
            cells = cells if place is None else spread(cells, place[1].shape)
            out = cells if out is None else out + cells
        return out

    def as_dict(self) -> dict[str, Any]:
        """What can be said in a line of JSON."""
        return {
            "layer": self.layer,
            "mechanism": self.mechanism,
            "kind": self.kind,
            "shape": list(self.map.shape),
            "queries": {s.name: list(s.shape) for s in self.queries},
            "keys": {s.name: list(s.shape) for s in self.keys},
            "rows": None if self.rows is None else self.rows.tolist(),
            "beside the product": [*self.added, *self.multiplied, *(["learned"] if self.learned is not None else [])],
        }

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.key_grid or ())) or "no grid"
        return f"AttentionMap({self.layer!r}, {self.mechanism}, {self.kind}, {list(self.map.shape)}, keys on {grid})"


def spread(cells: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Weights (..., h, w) to (..., H, W) of the same sum: evenly over what adaptive pooling to h x w joins."""
    rows = cover(grid[0], cells.shape[-2], cells)
    cols = cover(grid[1], cells.shape[-1], cells)
    return torch.einsum("...hw,hy,wx->...yx", cells, rows, cols)


def cover(fine: int, coarse: int, like: torch.Tensor) -> torch.Tensor:
    """(coarse, fine): each cell's bin of adaptive pooling along one axis, its row summing to 1."""
    index, cell = torch.arange(fine, device=like.device), torch.arange(coarse, device=like.device)[:, None]
    bins = ((index >= cell * fine // coarse) & (index < ((cell + 1) * fine + coarse - 1) // coarse)).to(like.dtype)
    return bins / bins.sum(1, keepdim=True)


class AttentionMaps(list):
    """The maps in the order of their layers' calls; a name is an index too, and ``keys``, ``values``, ``items`` work as
    a dict's.

    ``missed`` names modules that ran a softmax whose product was not recognised (talking heads mix weights after it).
    """

    missed: Sequence[str] = ()

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        for entry in self:
            if entry.layer == key:
                return entry
        raise KeyError(f"no map of a layer {key!r}: there are {', '.join(self.keys())}")

    def __contains__(self, key) -> bool:
        return key in self.keys() if isinstance(key, str) else super().__contains__(key)

    def keys(self) -> list[str]:
        return [entry.layer for entry in self]

    def values(self) -> list[AttentionMap]:
        return list(self)

    def items(self) -> list[tuple[str, AttentionMap]]:
        return [(entry.layer, entry) for entry in self]

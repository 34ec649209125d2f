"""Sparse attention under diffusers' context parallelism: tokens of a joint sequence spread over processes.

diffusers cuts text and image each into as many parts as there are processes (``ContextParallelConfig``), and leaves the
attention to the backend. ``ulysses_degree`` trades tokens for heads around the unchanged operator. ``ring_degree``,
where diffusers' dense attention passes all keys around, fetches only the halo that a pattern reaches
(:mod:`visionattn.ops.local.parallel`). Both are exact, and go together.
"""

from dataclasses import dataclass
from typing import Any

import torch

from visionattn.ops.local.exchange import heads_for_tokens, shares, tokens_for_heads
from visionattn.ops.local.parallel import Split, attend_split, pool_over
from visionattn.ops.local.patterns import Disk, Neighborhood, Pattern

from .layout import Layout


@dataclass(frozen=True)
class Shards:
    """This process's place: diffusers numbers the parts of a sequence ring first, Ulysses inside."""

    ring: int
    ulysses: int
    ring_rank: int
    ulysses_rank: int
    ring_group: Any
    ulysses_group: Any

    def __str__(self) -> str:
        kinds = [("Ulysses", self.ulysses), ("bands with halos (ring_degree)", self.ring)]
        return ", ".join(f"{name} over {n} processes" for name, n in kinds if n > 1)

    def sizes(self, total: int) -> tuple[int, ...]:
        """Tokens of each process, of ``total``."""
        return shares(total, self.ring * self.ulysses)

    def block(self, total: int) -> tuple[int, ...]:
        """Tokens of the processes that share this one's ring place."""
        return self.sizes(total)[self.ring_rank * self.ulysses :][: self.ulysses]

    def own(self, total: int) -> int:
        return self.block(total)[self.ulysses_rank]

    def ring_sizes(self, total: int) -> tuple[int, ...]:
        """Tokens at each ring place."""
        sizes = self.sizes(total)
        return tuple(sum(sizes[r * self.ulysses : (r + 1) * self.ulysses]) for r in range(self.ring))


def shards_of(config: Any) -> Shards | None:
    """The place that diffusers' parallel config, handed to a backend, tells; None without context parallelism."""
    config = getattr(config, "context_parallel_config", config)
    if config is None:
        return None
    return Shards(
        config.ring_degree, config.ulysses_degree, config._ring_local_rank, config._ulysses_local_rank,
        config._ring_mesh.get_group(), config._ulysses_mesh.get_group(),
    )  # fmt: skip


def role(layout: Layout, queries: int, keys: int, shards: Shards) -> str | None:
    """:meth:`Layout.role` of a process's part of a sequence."""
    if queries != keys:
        return None
    vision, text = shards.own(layout.tokens + layout.extra), shards.own(layout.text)
    if queries == vision + text:
        return "joint"
    return "image" if queries == vision else None


def why_not(pattern: Pattern, shards: Shards) -> str | None:
    """Why a pattern gains nothing from being spread so, or None."""
    if shards.ring > 1 and not isinstance(pattern, (Disk, Neighborhood)):
        return f"{type(pattern).__name__} needs all rows at every process of a ring: use ulysses_degree instead"
    return None


def sparse(layer: Any, q, k, v, scale: float | None, shards: Shards) -> torch.Tensor:
    """The layer's pattern on this process's part (B, n, H, D) of a sequence; returns the same part.

    Raises:
        ValueError: for fewer heads than Ulysses has processes.
    """
    layout: Layout = layer.session.layout
    text = layout.text if role(layout, q.shape[1], k.shape[1], shards) == "joint" else 0
    if shards.ulysses == 1:
        return _bands(layer, q, k, v, scale, shards, text)
    if q.shape[2] < shards.ulysses:
        raise ValueError(
            f"{q.shape[2]} heads cannot be spread over {shards.ulysses} processes: use a smaller ulysses_degree, "
            "and ring_degree for the rest"
        )
    heads = shares(q.shape[2], shards.ulysses)
    runs = (shards.block(text), shards.block(layout.tokens + layout.extra))
    runs = runs if layout.text_first else runs[::-1]
    whole = heads_for_tokens(torch.cat([q, k, v], -1), runs, heads, shards.ulysses_group)
    q, k, v = whole.chunk(3, -1)
    if shards.ring == 1:
        out = layer.sparse(q, k, v, scale)
    else:
        out = _bands(layer, q, k, v, scale, shards, text)
    return tokens_for_heads(out, runs, heads, shards.ulysses_group)


def _bands(layer: Any, q, k, v, scale: float | None, shards: Shards, text: int) -> torch.Tensor:
    """One ring place's tokens against what they reach at the others."""
    session, layout = layer.session, layer.session.layout
    vision, words = shards.ring_sizes(layout.tokens + layout.extra), shards.ring_sizes(text)
    ends = [sum(vision[: i + 1]) for i in range(shards.ring)]
    tokens = tuple(max(min(end, layout.tokens) - (end - n), 0) for n, end in zip(vision, ends, strict=True))
    extra = tuple(n - t for n, t in zip(vision, tokens, strict=True))
    own_words, own_tokens, own_extra = (x[shards.ring_rank] for x in (words, tokens, extra))
    lengths = session.text_lengths if text and layout.padded_text else None
    if lengths is not None and layout.extra:
        raise ValueError("reference tokens beside padded text are not supported: pass unpadded prompts")

    # [text | grid | references] of this place as [text | references | grid]: references see and are seen like text
    local = (own_words, own_tokens, own_extra) if layout.text_first else (own_tokens, own_extra, own_words)
    order = (0, 2, 1) if layout.text_first else (2, 1, 0)
    q, k, v = (torch.cat([x.split(local, 1)[i] for i in order], 1) for x in (q, k, v))
    split = Split(layout.grid, tokens, tuple(w + e for w, e in zip(words, extra, strict=True)))
    extra_k = extra_v = None
    factor = layer.pattern.downsample if isinstance(layer.pattern, Disk) else None
    if factor or layer.pool_weight is not None:
        factor = layer.pool_weight.shape[0] if layer.pool_weight is not None else factor
        image = torch.stack([x[:, own_words + own_extra :] for x in (k, v)])
        extra_k, extra_v = pool_over(image, split, factor, layer.pool_weight, shards.ring_group).unbind(0)
    out = attend_split(
        q, k, v, split, layer.pattern, True, lengths, extra_k, extra_v,
        session.scale(q.shape[-1], scale, layer, text + layout.extra), layer.backend, shards.ring_group,
    )  # fmt: skip
    words_out, extra_out, grid_out = out.split([own_words, own_extra, own_tokens], 1)
    return torch.cat([words_out, grid_out, extra_out] if layout.text_first else [grid_out, extra_out, words_out], 1)

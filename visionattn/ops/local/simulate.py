"""What a pattern saves, before anything runs: arithmetic by exact counts, time by measured ceilings.

Pairs become FLOP by 4 * head size * heads, tiles are counted by :mod:`visionattn.ops.local.counts`, and a network
around the attention turns a layer's gain into the network's (Amdahl). Two kinds of prediction:

- ``sol``: "speed of light", everything runs at the same rate, so only arithmetic counts;
- with :class:`Rates`: milliseconds, at TFLOP/s that were measured (:data:`RATES` says where).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .counts import visits
from .patterns import Disk, Grid, Neighborhood, Pattern, check_grid
from .rates import GLUON_FULL, GRID, TEXT

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A diffusion transformer as far as its arithmetic goes.

    Attributes:
        width: channels D.
        heads, head_dim: of each attention.
        layers: blocks with such an attention.
        text: text tokens in each of them.
        linear: FLOP of a block's linear layers per token, in units of D ** 2.
        embedding: FLOP per grid token of what stands before and after the blocks.
        text_embedding: FLOP per text token there.
        pixels: a grid token's side in pixels.
    """

    width: int
    heads: int
    head_dim: int
    layers: int
    text: int = 512
    linear: float = 24.0
    embedding: float = 0.0
    text_embedding: float = 0.0
    pixels: int = 16

    def linear_flop(self, tokens: int) -> float:
        """FLOP of everything but attention in one step, for so many grid tokens."""
        blocks = self.layers * self.linear * self.width**2 * (tokens + self.text)
        return blocks + self.embedding * tokens + self.text_embedding * self.text


_D = 3072
NETWORKS = {
    # 64 packed latent channels in and out; T5 features of 4096 channels
    "flux.1": Network(_D, 24, 128, 57, embedding=4 * 64 * _D, text_embedding=2 * 4096 * _D),
    "flux.2": Network(6144, 48, 128, 56, linear=26.0),
    "qwen-image": Network(_D, 24, 128, 60),
    "hunyuan-video": Network(_D, 24, 128, 60, text=256),
    # self-attention 8, queries and outputs of cross-attention 4, a feed-forward of 13,824 channels 10.8
    "wan-14b": Network(5120, 40, 128, 40, text=0, linear=22.8),
}


@dataclass(frozen=True)
class Rates:
    """TFLOP/s that a GPU was seen to execute, bfloat16, forward; ``overhead_ms`` comes on top of a sparse layer.

    Where ``windows`` are given, ``full`` and ``masked`` are of disks, ``windows`` of windows in two or three axes of
    whose tiles at least :data:`~visionattn.ops.local.rates.GLUON_FULL` need no mask, and ``others`` of all else.
    """

    linear: float
    dense: float
    full: float
    masked: float
    text: float
    overhead_ms: float = 0.0
    source: str = ""
    windows: tuple[float, float] | None = None
    others: tuple[float, float] | None = None

    def of(self, pattern: Pattern, axes: int, full: float) -> tuple[float, float]:
        """Rates of tiles without and with masks, `full` being the share of those without."""
        if isinstance(pattern, Disk) or self.windows is None:
            return self.full, self.masked
        if isinstance(pattern, Neighborhood) and axes > 1 and full >= GLUON_FULL:
            return self.windows
        return self.others or (self.full, self.masked)


RATES = {
    # benchmarks/results/flux-*.csv (the row without attention), and the rates of rates.py
    "h100-eager": Rates(
        390,
        620,
        GRID["gluon, disk"].full,
        GRID["gluon, disk"].masked,
        TEXT["cudnn"].full,
        0.09,
        "measured, benchmarks/results, NVIDIA H100, torch 2.11, eager",
        (GRID["gluon"].full, GRID["gluon"].masked),
        (GRID["triton"].full, GRID["triton"].masked),
    ),
    # the same with Triton's kernels alone (VISIONATTN_LOCAL_FORWARD and _TEXT), as they were measured first
    "h100-triton": Rates(
        390, 620, 437, 367, 430, 0.2, "measured, NVIDIA H100, torch 2.11, eager, Triton's kernels alone"
    ),
    # CLEAR's published table, least squares; the kernel's rate is an assumption
    "clear-paper": Rates(304, 618, 400, 400, 400, 0.0, "fitted to CLEAR's published times (arXiv 2412.16112)"),
    "clear-paper-compiled": Rates(
        500, 618, 400, 400, 400, 0.0, "as clear-paper, and an assumed 500 TFLOP/s for the rest once it is compiled"
    ),
}

# Tiles that kernels use or could, by the number of a grid's axes: (queries, keys).
TILES: dict[int, tuple[tuple[Shape, Shape], ...]] = {
    1: (((64,), (64,)), ((128,), (64,)), ((128,), (128,)), ((256,), (64,))),
    2: (
        ((8, 8), (8, 8)), ((8, 16), (8, 8)), ((8, 16), (8, 16)), ((16, 16), (8, 8)), ((16, 16), (8, 16)),
        ((16, 16), (16, 16)),
    ),
    3: (
        ((2, 4, 8), (2, 4, 8)), ((2, 8, 8), (2, 8, 8)), ((4, 4, 8), (4, 4, 8)), ((4, 8, 8), (2, 8, 8)),
        ((4, 8, 8), (4, 8, 8)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to compute the layer.

    ``tflop``: executed in a layer; ``masked``: share of it under a mask; ``layer_sol``, ``sol``: gain of the layer and
    of a step by arithmetic; ``ms``, ``layer_speedup``, ``speedup``: by the rates.
    """

    query: str
    key: str
    tflop: float
    masked: float
    layer_sol: float
    sol: float
    ms: float
    layer_speedup: float
    speedup: float


@dataclass(frozen=True)
class Simulation:
    """Result of :func:`simulate`; ``str()`` is a table, :meth:`as_dict` is for JSON."""

    grid: Grid
    pattern: Pattern
    network: Network
    rates: Rates
    batch: int
    dense_tflop: float
    ideal_tflop: float
    ideal_sol: float
    bound: float
    dense_ms: float
    step_ms: float
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    @property
    def best(self) -> Row:
        """The tiles with the shortest predicted layer."""
        return min(self.rows, key=lambda row: row.ms)

    def with_dense_steps(self, steps: int, dense: int) -> float:
        """Gain of ``steps`` steps of which the first ``dense`` stay dense, by arithmetic and the ideal pairs."""
        return mixed_gain(steps, dense, self.ideal_sol)

    def as_dict(self) -> dict:
        out = {"grid": list(self.grid), "pattern": str(self.pattern), "best": asdict(self.best)}
        for name in ("batch", "dense_tflop", "ideal_tflop", "ideal_sol", "bound", "dense_ms", "step_ms"):
            out[name] = getattr(self, name)
        return out | {
            "rates": asdict(self.rates),
            "rows": [asdict(row) for row in self.rows],
            "skipped": list(self.skipped),
        }

    def __str__(self) -> str:
        n = math.prod(self.grid)
        lines = [
            f"{self.pattern} on {' x '.join(map(str, self.grid))} = {n:,} tokens and {self.network.text} of text",
            f"a layer: dense {self.dense_tflop:.4g} TFLOP, the pattern {self.ideal_tflop:.4g} "
            f"({self.ideal_tflop / self.dense_tflop:.2%})",
            f"a step, by arithmetic: the pattern gives {self.ideal_sol:.2f} x, no attention at all {self.bound:.2f} x",
            f"rates: {self.rates.source}; dense: a layer {self.dense_ms:.4g} ms, a step {self.step_ms:.4g} ms",
            f"{'query tile':>12} {'key tile':>12} {'TFLOP':>9} {'masked':>7} {'layer':>8} {'step':>7} "
            f"{'ms':>9} {'layer':>8} {'step':>7}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.query:>12} {row.key:>12} {row.tflop:9.4g} {row.masked:7.0%} {row.layer_sol:7.2f}x "
                f"{row.sol:6.2f}x {row.ms:9.4g} {row.layer_speedup:7.2f}x {row.speedup:6.2f}x"
            )
        lines += list(self.skipped)
        best = self.best
        lines.append(f"best: queries {best.query}, keys {best.key}: {best.speedup:.2f} x a dense step")
        return "\n".join(lines)


def mixed_gain(steps: int, dense: int, gain: float) -> float:
    """Gain of ``steps`` steps where the first ``dense`` stay dense and the others gain ``gain``."""
    if not 0 <= dense <= steps or steps < 1:
        raise ValueError(f"dense_steps={dense} of {steps}: give a number from 0 to the number of steps")
    return steps / (dense + (steps - dense) / gain)


def simulate(
    grid: Sequence[int],
    pattern: Pattern,
    network: Network | str = "flux.1",
    tiles: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    rates: Rates | str = "h100-eager",
    batch: int = 1,
    raster: int | None = 128,
    placement: str = "aligned",
) -> Simulation:
    """Predicts a layer and a denoising step under a pattern.

    Args:
        grid: 1 to 3 lengths (tokens).
        pattern: what a grid token sees.
        network: a name of :data:`NETWORKS`, or a :class:`Network`.
        tiles: (query tile, key tile) pairs with a length per axis; :data:`TILES` by default.
        rates: a name of :data:`RATES`, or measured ones.
        batch: sequences at once.
        raster: also blocks of so many tokens in a row of the whole sequence, as FlexAttention has them without a
            permutation (for grids of two axes); None leaves the row out.
        placement: of key tiles, see :func:`visionattn.ops.local.counts.visits`: ``'aligned'`` for kernels that permute
            tokens, ``'anchored'`` for ours.

    Returns:
        :class:`Simulation`.

    Raises:
        ValueError: for a pattern that the grid does not have, an unknown network or rates, tiles of other axes.
    """
    grid = tuple(int(n) for n in grid)
    check_grid(grid)
    pattern.check(grid)
    network = _named("network", network, NETWORKS, Network)
    rates = _named("rates", rates, RATES, Rates)
    n, text = math.prod(grid), network.text
    flop = 4e-12 * network.head_dim * network.heads * batch
    linear = network.linear_flop(n) * batch * 1e-12
    dense = flop * (n + text) ** 2
    pooled = n * (n // pattern.downsample ** len(grid)) if isinstance(pattern, Disk) and pattern.downsample else 0
    ideal = flop * (pattern.pairs(grid) + n * text + text * (n + text))
    rest_ms = linear / rates.linear * 1e3
    dense_ms = dense / rates.dense * 1e3
    step_ms = rest_ms + network.layers * dense_ms

    def row(query: str, key: str, visited: int, full: int, area: int) -> Row:
        masked = flop * (visited - full) * area
        extra = flop * (pooled + _ceil(text, 64) * n)
        text_rows = flop * text * (n + text)
        tflop = flop * visited * area + extra + text_rows
        fast, slow = rates.of(pattern, len(grid), full / max(visited, 1))
        ms = 1e3 * (masked / slow + (tflop - masked - text_rows) / fast + text_rows / rates.text)
        ms += rates.overhead_ms
        return Row(
            query, key, tflop, masked / tflop, dense / tflop,
            (linear + network.layers * dense) / (linear + network.layers * tflop),
            ms, dense_ms / ms, step_ms / (rest_ms + network.layers * ms),
        )  # fmt: skip

    rows, skipped = [], []
    for query, key in tiles if tiles is not None else TILES[len(grid)]:
        query, key = _tile(query, grid), _tile(key, grid)
        names = ["x".join(map(str, t)) for t in (query, key)]
        try:
            seen, full = visits(pattern, grid, _pad(query), _pad(key), placement)
        except ValueError as e:
            skipped.append(f"{names[0]} / {names[1]}: {e}")
            continue
        rows.append(row(*names, seen, full, math.prod(query) * math.prod(key)))
    if raster and len(grid) == 2:
        block = (1, max(1, raster // grid[-1]), min(raster, grid[-1]))
        try:
            seen, full = visits(pattern, grid, block, block, "aligned")
            rows.append(row(f"{raster} in a row", f"{raster} in a row", seen, full, math.prod(block) ** 2))
        except ValueError as e:
            skipped.append(f"raster: {e}")
    if not rows:
        raise ValueError(f"no tiles are known for {pattern}: {skipped[0] if skipped else 'give tiles=[(query, key)]'}")
    return Simulation(
        grid, pattern, network, rates, batch, dense, ideal,
        (linear + network.layers * dense) / (linear + network.layers * ideal),
        (linear + network.layers * dense) / linear, dense_ms, step_ms, tuple(rows), tuple(skipped),
    )  # fmt: skip


def _ceil(n: int, to: int) -> int:
    return -(-n // to) * to


def _pad(tile: Shape) -> Shape:
    return (1,) * (3 - len(tile)) + tile


def _tile(tile: Sequence[int], grid: Grid) -> Shape:
    tile = tuple(int(t) for t in tile)
    if len(tile) != len(grid) or any(t < 1 for t in tile):
        raise ValueError(f"tile {tile} does not fit a grid of {len(grid)} axes: give one positive length an axis")
    return tile


def _named(what: str, value, known: dict, kind: type):
    if isinstance(value, kind):
        return value
    if value not in known:
        raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(known)}, or a {kind.__name__}")
    return known[value]

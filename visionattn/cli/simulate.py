"""``simulate``: what a local pattern saves in a diffusion transformer, by exact counts and measured rates."""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

from .patterns import SYNTAX, parse_pattern, parse_shape
from .table import Table, positive


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser(
        "simulate", parents=[common], help="what a local pattern saves, before anything runs",
        description="Counts what a pattern computes in tiles, and predicts a layer's and a denoising step's time.",
    )  # fmt: skip
    p.add_argument("pattern", nargs="?", default="disk:16", help=SYNTAX)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--size", type=int, default=4096, help="pixels of a square picture's side")
    where.add_argument("--grid", type=int, nargs="+", help="tokens: 1 to 3 lengths, as 33 45 80")
    p.add_argument("--network", default="flux.1", help="flux.1, flux.2, qwen-image, hunyuan-video, wan-14b")
    p.add_argument("--text", type=int, help="text tokens; the network's own by default")
    p.add_argument(
        "--rates", help="h100-eager (the default), h100-triton, clear-paper, clear-paper-compiled; with --measured "
        "the first or second, whichever fits better",
    )  # fmt: skip
    p.add_argument("--tiles", nargs="+", metavar="QUERY/KEY", help="as 8x16/8x8; the usual ones by default")
    p.add_argument("--batch", type=positive, default=1, help="sequences at once")
    p.add_argument("--steps", type=int, default=28, help="denoising steps of a picture")
    p.add_argument("--dense-steps", type=int, default=0, help="of these, how many at the start stay dense")
    p.add_argument("--picture", help="file to draw visited tiles and gains into (.png); NAME-tiles.png stands beside")
    p.add_argument("--measured", metavar="CSV", help="a result of benchmarks/flux.py or local_attention.py to predict")
    p.set_defaults(run=simulate)


@dataclass
class Result:
    """A simulation with what the command adds."""

    simulation: Any
    steps: int
    dense_steps: int
    whole: float
    pictures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        more = {"steps": self.steps, "dense_steps": self.dense_steps, "whole_gain": self.whole}
        return self.simulation.as_dict() | more | {"pictures": self.pictures}

    def __str__(self) -> str:
        lines = [str(self.simulation)]
        if self.dense_steps:
            lines.append(
                f"{self.steps} steps, the first {self.dense_steps} dense: {self.whole:.2f} x with the best tiles"
            )
        return "\n".join(lines + [f"picture: {path}" for path in self.pictures])


def simulate(args: argparse.Namespace) -> Any:
    from visionattn.ops.local.simulate import NETWORKS, mixed_gain
    from visionattn.ops.local.simulate import simulate as run

    if args.measured:
        return measured(args)
    if args.picture and not args.picture.lower().endswith(".png"):
        raise ValueError(f"--picture {args.picture}: give a name that ends with .png")
    pattern = parse_pattern(args.pattern)
    network: Any = args.network
    if args.text is not None:
        if args.text < 0:
            raise ValueError(f"--text {args.text}: give 0 or more tokens")
        if network in NETWORKS:
            network = replace(NETWORKS[network], text=args.text)
    grid = args.grid or _square(args.size, NETWORKS[args.network].pixels if args.network in NETWORKS else 16)
    tiles = None
    if args.tiles:
        tiles = [_pair(text) for text in args.tiles]
    found = run(grid, pattern, network, tiles, args.rates or "h100-eager", args.batch)
    whole = mixed_gain(args.steps, args.dense_steps, found.best.speedup)
    result = Result(found, args.steps, args.dense_steps, whole)
    if args.picture:
        result.pictures = _draw(found, args.picture)
    return result


def measured(args: argparse.Namespace) -> Table:
    """Predicted beside measured."""
    from visionattn.ops.local.measured import compare_with

    rows = compare_with(args.measured, args.rates)
    if not rows:
        raise ValueError(f"{args.measured} has no row that can be predicted")
    cells = [(r.what, r.gpu, round(r.predicted_ms, 3), round(r.measured_ms, 3), round(r.ratio, 3)) for r in rows]
    return Table(("what", "gpu", "predicted ms", "measured ms", "predicted / measured"), cells)


def _square(size: int, pixels: int) -> tuple[int, int]:
    if size < pixels or size % pixels:
        raise ValueError(f"--size {size}: give a multiple of {pixels} px, a token's side")
    return (size // pixels, size // pixels)


def _pair(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    query, slash, key = text.partition("/")
    if not slash:
        raise ValueError(f"--tiles {text!r}: write a query tile and a key tile with / between, as 8x16/8x8")
    return parse_shape(query), parse_shape(key)


def _draw(found: Any, path: str) -> list[str]:
    from pathlib import Path

    from visionattn.plots.maps import save
    from visionattn.plots.patterns import simulation_figure, visits_figure

    target = Path(path)
    save(simulation_figure(found), target)
    best = found.best
    if "row" in best.query:  # raster blocks have no tile to draw
        return [str(target)]
    tiles = parse_shape(best.query), parse_shape(best.key)
    second = target.with_name(f"{target.stem}-tiles{target.suffix}")
    title = f"tiles of keys that two tiles of queries visit\n{best.query} and {best.key} tokens"
    save(visits_figure([(str(found.pattern), found.pattern, *tiles)], found.grid, title), second)
    return [str(target), str(second)]

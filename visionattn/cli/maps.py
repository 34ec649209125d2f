"""``maps``: where a model's attention goes, drawn over an image."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .images import Subject, add_arguments, read_images, subject

PANELS = 11  # layers drawn, evenly chosen where there are more
DRAWINGS = ("overlay", "rollout", "query")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("maps", parents=[common], help="attention maps over an image: overlays, rollout, a query")
    add_arguments(p, many=False)
    p.add_argument("--layers", nargs="+", metavar="NAME", help="names or patterns, or numbers in the order of calls")
    p.add_argument("--query", nargs=2, type=float, metavar=("Y", "X"), default=(0.5, 0.5), help="a place, 0 to 1 each")
    p.add_argument("--draw", nargs="+", choices=DRAWINGS, default=DRAWINGS, help="pictures to draw; all by default")
    p.add_argument("--list", action="store_true", help="only name the layers")
    p.set_defaults(run=maps)


@dataclass
class Drawn:
    """What was drawn, and of which layers."""

    model: str
    weights: str
    image: str
    prediction: str | None
    pictures: dict[str, str]
    layers: list[dict[str, Any]]
    missed: list[str]

    def as_dict(self) -> dict[str, Any]:
        return vars(self)

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.weights}), {self.image}" + (f": {self.prediction}" if self.prediction else "")]
        for e in self.layers:
            grid = next((v for k, v in e["keys"].items() if k in ("grid", "pooled")), None)
            where = "x".join(map(str, grid)) if grid else "-"
            lines.append(f"  {e['layer']:<32} {e['mechanism']:<24} {e['kind']:<8} {where}")
        lines += [f"  no map: {name} (its softmax is mixed further)" for name in self.missed]
        return "\n".join([*lines, *(f"{name}: {path}" for name, path in self.pictures.items())])


def maps(args: argparse.Namespace) -> Drawn:
    import torch

    from visionattn.maps import attention_maps

    if not all(0.0 <= p < 1.0 for p in args.query):
        raise ValueError(f"--query {args.query[0]:g} {args.query[1]:g}: give y and x from 0 (top, left) to below 1")
    found = subject(args)
    ((name, image),) = read_images(args, found)[:1]
    x = found.tensor(image)
    layers = [int(n) if n.lstrip("-").isdigit() else n for n in args.layers] if args.layers else None
    panels: dict[str, list] = {"overlay": [], "query": []}
    point = tuple(args.query)

    def look(amap: Any) -> dict[str, Any]:
        if not args.list:
            for kind, panel in (("overlay", seen_by_all(amap)), ("query", seen_by(amap, point))):
                if panel is not None:
                    panels[kind].append((_label(amap), panel, amap.kind in ("signed", "gate")))
        return amap.as_dict()

    result = attention_maps(found.model, x, layers, heads="mean", values=False, each=look)
    prediction = None
    if found.weights != "random weights" and getattr(found.model, "num_classes", 0):
        with torch.no_grad():
            scores = found.model(x)[0].float().softmax(dim=0)
        prediction = f"{found.label(int(scores.argmax()))} ({float(scores.max()):.2f})"
    drawn = Drawn(found.name, found.weights, name, prediction, {}, list(result), list(result.missed))
    if not args.list:
        draw(drawn, found, x, panels, point, layers, args)
    return drawn


def draw(drawn: Drawn, found: Subject, x: Any, panels: dict, point: tuple, layers: list | None, args: Any) -> None:
    from visionattn.maps import rollout
    from visionattn.plots.maps import maps_figure, save

    image = found.shown(x)
    about = f"{found.title}, {drawn.image}" + (f": {drawn.prediction}" if drawn.prediction else "")
    stem = f"{found.name}-{drawn.image}"
    titles = {"overlay": "attention of the whole", "query": "attention of the marked place"}
    for kind, title in titles.items():
        if kind in args.draw and panels[kind]:
            figure = maps_figure(image, _some(panels[kind]), f"{about}\n{title}", point if kind == "query" else None)
            drawn.pictures[kind] = str(save(figure, Path(args.out) / f"{stem}-{kind}.png"))
    if "rollout" in args.draw:
        try:
            flow = rollout(found.model, x, layers)
        except ValueError:  # masks and gates mix no tokens
            return
        heat = flow.on_image()[0].cpu().numpy()
        label = f"{len(flow.layers)} layers, {flow.layers[0]} to {flow.layers[-1]}"
        figure = maps_figure(image, [(label, heat, False)], f"{about}\nattention rollout")
        drawn.pictures["rollout"] = str(save(figure, Path(args.out) / f"{stem}-rollout.png"))


def seen_by_all(amap: Any) -> Any:
    """(H, W): what the class token attends to, or the mean over the tokens where there is none; a mask's mean over its
    groups. None where the layer has no map of the image."""
    try:
        weights = amap.on_image()[0].float().mean(dim=0)
    except ValueError:
        return None
    row = weights[0] if amap.num_prefix_tokens or amap.kind in ("mask", "gate") else weights.mean(dim=0)
    return row.cpu().numpy()


def seen_by(amap: Any, point: tuple[float, float]) -> Any:
    """(H, W): what the token at a place attends to; None where the layer's queries lie on no map."""
    if amap.kind in ("mask", "gate") or amap.query_grid is None or len(amap.query_grid) != 2:
        return None
    try:
        weights = amap.on_image()[0].float().mean(dim=0)
    except ValueError:
        return None
    H, W = amap.query_grid
    index = amap.num_prefix_tokens + int(point[0] * H) * W + int(point[1] * W)
    return weights[index].cpu().numpy()


def _label(amap: Any) -> str:
    return f"{amap.layer}\n{amap.mechanism}, {'x'.join(map(str, amap.key_grid or amap.map.shape[-2:]))}"


def _some(panels: list) -> list:
    if len(panels) <= PANELS:
        return panels
    return [panels[round(i * (len(panels) - 1) / (PANELS - 1))] for i in range(PANELS)]

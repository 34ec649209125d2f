"""``list``, ``info`` and ``card``: what the zoo has."""

import argparse
import fnmatch
from difflib import get_close_matches
from typing import Any

from .table import Facts, Table, positive


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("list", parents=[common], help="models and modules of the zoo")
    p.add_argument("pattern", nargs="?", default="*", help="with * and ?, for example 'agent_*'")
    p.set_defaults(run=list_models)
    p = commands.add_parser("info", parents=[common], help="parameters, MACs, strides, paper, checkpoints of a model")
    p.add_argument("model")
    p.add_argument("--img-size", type=positive, help="pixels of a side; the model's own by default")
    p.add_argument("--batch", type=positive, default=1, help="images of the memory estimate")
    p.set_defaults(run=info)
    p = commands.add_parser("card", parents=[common], help="a model card in Markdown")
    p.add_argument("model", help="name, or name.tag")
    p.add_argument("--out", help="file to write; printed otherwise")
    p.set_defaults(run=card)


def zoo() -> list[str]:
    """Names of the registered backbones of this package."""
    import timm
    from timm.models import model_entrypoint

    import visionattn  # noqa: F401  registers them

    return [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("visionattn.")]


def check_name(model: str) -> str:
    """``model`` if timm can build it (a tag may follow), else a ValueError that names the nearest of the zoo."""
    import timm

    names = zoo()
    arch = model.split(":")[-1] if ":" in model else model.split(".")[0]
    if ":" in model:
        return model
    if arch in names or timm.is_model(arch):
        tag = model.partition(".")[2]
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{arch}.*")]
        if tag and tag not in tags:
            known = f"its tags are {', '.join(tags)}" if tags else "it has none"
            raise ValueError(f"{arch} has no weights under the tag {tag!r}: {known}")
        return model
    near = get_close_matches(arch, {*names, *timm.list_models()}, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "'visionattn list' shows the zoo"
    raise ValueError(f"no model is called {model!r}: {hint}")


def list_models(args: argparse.Namespace) -> Table:
    import visionattn

    rows: list[tuple[str, str, Any]] = []
    for name in zoo():
        rows.append((name, "backbone", _tags(name)))
    for name in visionattn.list_modules():
        from visionattn.layers import module_kind

        rows.append((name, f"{module_kind(name)} module", None))
    rows = [r for r in rows if fnmatch.fnmatchcase(r[0], args.pattern)]
    if not rows:
        near = get_close_matches(args.pattern.strip("*"), zoo(), n=3)
        raise ValueError(f"nothing matches {args.pattern!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    return Table(("name", "kind", "weights"), rows)


def _tags(name: str) -> str | None:
    from visionattn.checkpoints import manifest

    tags = [e.name.partition(".")[2] for e in manifest().values() if e.model == name and (e.url or e.file)]
    return ", ".join(tags) or None


def info(args: argparse.Namespace) -> Facts:
    import timm

    name = check_name(args.model)
    kwargs = {"img_size": args.img_size} if args.img_size else {}
    try:
        model = timm.create_model(name, **kwargs)
    except TypeError:  # a model whose size is not fixed
        model = timm.create_model(name)
    return Facts(describe(model.eval(), name, args.img_size, args.batch))


def describe(model: Any, name: str, img_size: int | None = None, batch: int = 1) -> dict[str, Any]:
    """Facts of a built model; MACs count every matrix product, those of attention too."""
    from visionattn.checkpoints import manifest

    cfg = model.pretrained_cfg
    size = (cfg["input_size"][0], img_size, img_size) if img_size else tuple(cfg["input_size"])
    params = sum(p.numel() for p in model.parameters())
    cost = measure(model, size)
    arch = name.split(".")[0]
    released = {
        e.name: ", ".join(str(v) for v in (e.top1 and f"top-1 {e.top1}", e.url or e.file or e.note) if v)
        for e in manifest().values()
        if e.model == arch
    }
    feature_info = getattr(model, "feature_info", None) or []
    activations = cost["activations"]
    return {
        "model": name,
        "paper": " ".join(str(cfg.get(k) or "") for k in ("paper_name", "paper_ids")).strip() or None,
        "source": cfg.get("origin_url"),
        "licence of weights": cfg.get("license"),
        "input": list(size),
        "parameters": params,
        "MACs": cost["macs"],
        "activations": activations,
        "strides": [f["reduction"] for f in feature_info],
        "channels": [f["num_chs"] for f in feature_info],
        "classes": model.num_classes,
        "memory of weights, bfloat16 (MiB)": round(params * 2 / 2**20, 1),
        f"memory of activations, batch {batch}, bfloat16, training, at most (MiB)": round(
            batch * activations * 2 / 2**20, 1
        ),
        "mechanisms": mechanisms(model),
        "checkpoints": released,
    }


def mechanisms(model: Any) -> list[str]:
    """Registered modules of the zoo inside of the model, by class name, with their number."""
    from collections import Counter

    found = Counter(type(m).__name__ for m in model.modules() if type(m).__module__.startswith("visionattn.layers."))
    return [f"{n} x {name}" for name, n in sorted(found.items())]


def measure(model: Any, size: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of one image, and elements that its leaf modules put out; on meta tensors if possible."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    count = 0

    def add(_module: Any, _args: Any, out: Any) -> None:
        nonlocal count
        if isinstance(out, torch.Tensor):
            count += out.numel()

    def forward(network: Any, device: str) -> int:
        hooks = [m.register_forward_hook(add) for m in network.modules() if not any(True for _ in m.children())]
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, *size, device=device))
            return counter.get_total_flops() // 2
        finally:
            for hook in hooks:
                hook.remove()

    try:
        macs = forward(copy.deepcopy(model).to("meta"), "meta")
    except (NotImplementedError, RuntimeError):  # a layer that looks at values
        count = 0
        macs = forward(model, "cpu")
    return {"macs": macs, "activations": count}


def card(args: argparse.Namespace) -> str | None:
    from pathlib import Path

    from visionattn._files import atomic_write

    text = model_card(check_name(args.model))
    if args.out is None:
        return text
    atomic_write(Path(args.out), text + "\n")
    return f"written to {args.out}"


def model_card(name: str) -> str:
    """A card in Markdown: paper, licence, counts, results, recipe; only what the cfg, the manifest and a count say.

    Args:
        name: a registered name, or one with a tag that is registered or in the manifest.

    Raises:
        ValueError: for a tag that neither knows.
    """
    import timm
    import torch

    from visionattn.checkpoints import manifest

    arch, _, tag = name.partition(".")
    of_model = [e for e in manifest().values() if e.model == arch]
    entries = [e for e in of_model if name in (arch, e.name)]
    tagged = timm.list_models(f"{arch}.*", include_tags=True)
    if tag and name not in tagged and not entries:
        known = sorted({*tagged, *(e.name for e in of_model)})
        raise ValueError(f"{arch} has no tag {tag!r}: there are {', '.join(known) or 'none'}")
    with torch.device("meta"):
        model = timm.create_model(name if name in tagged else arch).eval()
    return render_card(name, model.pretrained_cfg, describe(model, name), entries)


def render_card(name: str, cfg: dict[str, Any], facts: dict[str, Any], entries: list[Any]) -> str:
    """The text of a card.

    Args:
        cfg: the pretrained cfg as a dictionary.
        facts: of :func:`describe`.
        entries: of the manifest, those that the card lists.
    """
    arch = name.partition(".")[0]
    own = next((e for e in entries if e.name == name), None)
    recipe = find_recipe(arch)
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "classes": f"{facts['classes']:,}",
        f"MACs at {facts['input'][1]} x {facts['input'][2]}": f"{facts['MACs']:,}",
        "mechanisms": ", ".join(facts["mechanisms"]) or "-",
        "source": cfg.get("origin_url") or "-",
        "licence of weights": (own and own.licence) or cfg.get("license") or "-",
        "evaluation": f"{cfg['interpolation']}, crop {cfg['crop_pct']} ({cfg.get('crop_mode') or 'center'}), "
        f"mean {_values(cfg['mean'])}, std {_values(cfg['std'])}",
    }
    if own and own.recipe:
        rows["recipe"] = f"`{own.recipe}`"
    elif recipe:
        rows["recipe"] = f"`configs/train/{recipe}`"
    lines = [f"# {name}", "", facts["paper"] or "No paper is named.", ""]
    lines += [f"{cfg['description']}.", ""] if cfg.get("description") else []
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    if entries:
        lines += ["", "| checkpoint | size | top-1, % | on | licence | from |", "|" + " --- |" * 6]
        lines += [_checkpoint_line(e) for e in entries]
    pretrained = ", pretrained=True" if own and own.file else ""
    return "\n".join([*lines, "", "```python", f'timm.create_model("{name}"{pretrained})', "```"])


def _checkpoint_line(entry: Any) -> str:
    on = entry.dataset if entry.top1 else "-"
    where = f"`weights/{entry.file}`" if entry.file else entry.url or entry.note or "-"
    size = f"{entry.img_size} px" if entry.img_size else "-"
    return f"| {entry.name} | {size} | {entry.top1 or '-'} | {on} | {entry.licence} | {where} |"


def _values(numbers: Any) -> str:
    return " ".join(f"{n:g}" for n in numbers)


def find_recipe(arch: str) -> str | None:
    """The recipe under ``configs/train`` that names the model, or its family's."""
    from visionattn.checkpoints.manifest import weights_folder

    folder = weights_folder().parent / "configs" / "train"
    names = sorted(p.name for p in folder.glob("*.yaml"))
    exact = [n for n in names if n == f"{arch}.yaml"]
    family = [n for n in names if arch.startswith(n.removesuffix(".yaml"))]
    return (exact or sorted(family, key=len, reverse=True) or [None])[0]

"""Parameters and multiply-adds of the zoo against the published tables, differences named; no weights, no GPU.

    python benchmarks/parameters.py              # counts what the CSV file lacks; then docs/results.md, the picture
    python benchmarks/parameters.py --again      # counts everything anew

The published numbers are those of ``tests/fixtures/*/paper_table.json``: what the papers or their code print, and what
the reference implementations count. Ours are counted on meta tensors: no memory for weights, nothing computed.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visionattn
from visionattn._files import atomic_write, replacing

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
FIELDS = [
    "system", "row", "model", "px", "params", "params_reference", "params_M_published", "params_verdict", "GMACs",
    "GMACs_reference", "GFLOPs_published", "GMACs_verdict", "top1_published", "difference",
]  # fmt: skip
BEGIN, END = "<!-- benchmarks/parameters.py writes from here -->", "<!-- to here -->"

# why a system's numbers differ from what is printed, where they do
WHY = {
    "agent": "printed as fvcore counts, which adds norms and interpolation",
    "inline": "the subtraction is carried out on D x D sums: fewer products than in the released code; printed as "
    "fvcore counts",
    "mala": "printed: close to the convolutions alone, most attention products are left out; the reference's 0.01 to "
    "0.02 % more are its normaliser q . mean(k), which is no matrix product here",
    "nat": "counted on tiles, as on a CPU: they compute masked pairs beside the window's; the window's products alone "
    "give the reference's number",
    "halo": "the reference leaves out the relative logits",
    "ulsam": "printed: 2 m parameters and 2 m h w products a module of m channels, no norms in what a module replaces; "
    "ours: all parameters of the module as released, 5 m + 3 g",
    "moh": "MoH-ViT: the products with the 9 nearest keys are done shift by shift and elementwise, which the counter "
    "does not see; every head is counted, whatever the share of active ones",
}


@dataclass
class Row:
    """What is published of a model, and how to build ours."""

    system: str
    row: str
    model: str
    px: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    params_reference: int | None = None
    params_M: float | None = None
    gmacs_reference: float | None = None
    gflops: float | None = None
    top1: float | None = None
    note: str = ""


def table(system: str) -> dict:
    return json.loads((FIXTURES / system / "paper_table.json").read_text())


def image(px: int, channels: int = 3) -> Callable[[], tuple]:
    return lambda: (torch.zeros(1, channels, px, px),)


def timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **kwargs)


def hosts_and_nat() -> Iterator[Row]:
    """Agent, InLine, MALA, NAT and DiNAT: tables by registered name."""
    for system in ("agent", "inline", "mala", "nat"):
        content = table(system)
        for name, v in {**content["models"], **content.get("optional_models", {})}.items():
            if not timm.is_model(name):
                continue
            if "torch_flop_counter_gflops" in v:
                reference = v["torch_flop_counter_gflops"] / 2
            else:
                reference = v.get("macs_G_computed")
            yield Row(
                name.split("_")[0], name, name, v["resolution"], timm_model(name), image(v["resolution"]),
                v.get("official_num_params"), v.get("params_M"), reference, v.get("flops_G"), v.get("top1"),
                v.get("note", ""),
            )  # fmt: skip


def halo() -> Iterator[Row]:
    for size, v in table("halonet")["family"].items():
        name = f"halo_{size.lower()}"
        yield Row(
            "halo", size, name, v["resolution"], timm_model(name), image(v["resolution"]), v["exact_params"],
            v["params_M"], v["macs_G_computed"], None, v["top1"],
        )  # fmt: skip


def moh() -> Iterator[Row]:
    for row, v in table("moh_vit")["models"].items():
        name = v["constructor"].replace("moh_transnext", "moh_vit")
        yield Row(
            "moh", row, name, 224, timm_model(name), image(224), v["official_num_params"], v["params_M"],
            v["computed_macs_G_all_heads"], None, v["metric"]["imagenet_top1"],
        )  # fmt: skip
    seen = set()
    for row, v in table("moh_dit")["models"].items():
        name = v["constructor"].lower()
        if name in seen:
            continue
        seen.add(name)

        def inputs() -> tuple:
            return torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)

        yield Row(
            "moh", row, name, 256, lambda name=name: visionattn.create_dit(name), inputs, v["official_num_params"],
            v["params_M"], v.get("computed_macs_G_all_heads"), None,
        )  # fmt: skip


def ninformer() -> Iterator[Row]:
    for row, v in table("ninformer")["models"].items():
        change = v.get("config_change", {})
        small = change.get("image_size") == 28
        name = "ninformer_patch4_28" if small else "ninformer_patch4_32"
        classes = {"num_classes": change["num_classes"]} if "num_classes" in change else {}
        yield Row(
            "ninformer", row.split(" (")[0], name, v["resolution"], timm_model(name, **classes),
            image(v["resolution"], 1 if small else 3), v["official_num_params"], None, v.get("computed_macs_G"),
        )  # fmt: skip


def ela() -> Iterator[Row]:
    for row, v in table("ela")["rows"].items():
        host, version = row.split("+ELA-")
        name = f"ela_{version.lower()}_{host}"
        exact = v.get("exact_params_in_block") or v.get("exact_params")
        if timm.is_model(name):
            yield Row(
                "ela", row, name, 224, timm_model(name), image(224), exact, v["params_M"], v.get("flops_G_computed"),
                v["flops_G"], v["top1"],
            )  # fmt: skip


def ulsam() -> Iterator[Row]:
    """Rows of the ImageNet table with a module in them; the positions are part of a row's name."""
    for row, v in table("ulsam")["imagenet"].items():
        found = re.match(r"(?:(0\.75|0\.5) )?MV([12]).*?(?:after layer (\d+)|layers? ([\d,]+) )?.* ?g=(\d+)", row)
        if not found or "params_M" not in v:
            continue
        width, version, _, _, groups = found.groups()
        after = re.search(r"after layer (\d+)", row)
        replaced = re.search(r"layers ([\d,]+) replaced", row)
        where: dict[str, Any] = {"replace": [12]}
        if after:
            where = {"insert_after": [int(after[1])]}
        elif replaced:
            where = {"replace": [int(n) for n in replaced[1].split(",")]}
        scale = {"0.75": "075", "0.5": "050", None: "100"}[width]
        name = f"ulsam_mobilenetv{version}_{scale}"
        yield Row(
            "ulsam", row, name, 224, timm_model(name, groups=int(groups), **where), image(224), v.get("exact_params"),
            v["params_M"], None, v["flops_G"], v.get("top1"),
        )  # fmt: skip


SOURCES = (hosts_and_nat, halo, moh, ninformer, ela, ulsam)


def agrees(value: float, printed: float) -> bool:
    """Whether ``value`` rounds to ``printed`` at its last printed digit."""
    exponent = Decimal(repr(printed)).normalize().as_tuple().exponent
    step = Decimal(10) ** min(int(exponent), 0)
    return abs(Decimal(repr(value)) - Decimal(repr(printed))) <= step / 2


def count(row: Row) -> tuple[int, float | None, str]:
    """Parameters, multiply-adds / 1e9 of one input, and why there are none."""
    with torch.device("meta"), torch.no_grad():
        model = row.build().eval()
        params = sum(p.numel() for p in model.parameters())
        try:
            with FlopCounterMode(display=False) as counter:
                model(*row.inputs())
        except (NotImplementedError, RuntimeError) as e:
            return params, None, f"not counted: {' '.join(str(e).split())[:80]}"
    return params, counter.get_total_flops() / 2e9, ""


def verdicts(row: Row, params: int, gmacs: float | None) -> tuple[str, str, list[str]]:
    """How both counts compare, and the differences in words."""
    words = []
    if row.params_reference is not None:
        by_params = "equal" if params == row.params_reference else f"{params - row.params_reference:+,}"
    else:
        by_params = ""
    if row.params_M is not None and not agrees(params / 1e6, row.params_M):
        words.append(f"{row.params_M:g} M printed")
    by_macs = ""
    if gmacs is not None and row.gmacs_reference:
        share = gmacs / row.gmacs_reference - 1  # the tables have four decimals, some of them two
        same = agrees(gmacs, row.gmacs_reference) or abs(gmacs - row.gmacs_reference) < 1.1e-4
        by_macs = "equal" if same else f"{100 * share:+.2f} %"
    if gmacs is not None and row.gflops is not None and not agrees(gmacs, row.gflops):
        words.append(f"{row.gflops:g} G printed")
    return by_params, by_macs, words


def measure(row: Row, known: dict[str, str] | None) -> dict[str, Any]:
    """The row of the CSV file; ``known`` is an earlier one, whose counts are taken over."""
    if known and known["GMACs"]:
        params, gmacs, problem = int(known["params"]), float(known["GMACs"]), ""
    else:
        params, gmacs, problem = count(row)
    by_params, by_macs, words = verdicts(row, params, gmacs)
    why = WHY.get("nat" if row.system == "dinat" else row.system)
    if why and (by_macs not in ("", "equal") or any(word.endswith("G printed") for word in words)):
        words.append(why)
    if row.note:
        words.append(row.note.rstrip("."))
    return {
        "system": row.system, "row": row.row, "model": row.model, "px": row.px, "params": params,
        "params_reference": row.params_reference, "params_M_published": row.params_M, "params_verdict": by_params,
        "GMACs": None if gmacs is None else round(gmacs, 5), "GMACs_reference": row.gmacs_reference,
        "GFLOPs_published": row.gflops, "GMACs_verdict": by_macs, "top1_published": row.top1,
        "difference": " | ".join([*words, problem] if problem else words),
    }  # fmt: skip


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, str]]) -> str:
    """A table a system; differences that several rows share stand under it once."""
    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        chosen = [r for r in rows if r["system"] == system]
        lines += ["", f"### {system}", "", "| row | px | parameters | reference | printed, M | GMACs | reference | "
                  "printed, G | top-1, published | |", "|" + "---|" * 10]  # fmt: skip
        notes: dict[str, int] = {}
        for r in chosen:
            marks = []
            for part in filter(None, r["difference"].split(" | ")):
                if part.endswith("printed"):
                    marks.append(part)
                else:
                    marks.append(f"[{notes.setdefault(part, len(notes) + 1)}]")
            lines.append(
                f"| {r['row']} | {r['px']} | {int(r['params']):,} | {r['params_verdict'] or '-'} | "
                f"{r['params_M_published'] or '-'} | {r['GMACs'] or '-'} | {r['GMACs_verdict'] or '-'} | "
                f"{r['GFLOPs_published'] or '-'} | {r['top1_published'] or '-'} | {', '.join(marks)} |"
            )
        for text, number in notes.items():
            lines += ["", f"[{number}] {text}."]
    return "\n".join(lines)


def write_document(path: Path, rows: list[dict[str, str]]) -> None:
    old = path.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"parameters.py: {path} has no place for the tables, between {BEGIN!r} and {END!r}")
    text = f"{BEGIN}\n{markdown(rows)}\n{END}"
    atomic_write(path, re.sub(f"{BEGIN}.*{END}", lambda m: text, old, flags=re.S))


def picture(path: Path, rows: list[dict[str, str]]) -> None:
    """Our parameter counts against the published ImageNet-1k accuracies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for system, marker in zip(
        ("agent", "inline", "mala", "halo", "nat", "dinat", "moh", "ulsam"), "osD^vP*X", strict=True
    ):
        points = [(int(r["params"]) / 1e6, float(r["top1_published"])) for r in rows
                  if r["system"] == system and r["top1_published"]]  # fmt: skip
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, s=42, alpha=0.75, label=system)
    axis.set_xscale("log")
    axis.set_xlabel("parameters, millions (counted here)")
    axis.set_ylabel("ImageNet-1k top-1, % (as published; not measured here)")
    axis.set_title("Sizes differ between points: 224 to 600 px, as published")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    atomic_write(path, lambda f: figure.savefig(f, dpi=110, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="count rows that the file has, too")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/parameters.csv")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/pictures/results_parameters.png")
    args = parser.parse_args()
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if args.csv.exists() and not args.again:
        with args.csv.open(newline="") as file:
            known = {(r["system"], r["row"]): r for r in csv.DictReader(file)}
    rows = []
    wanted = [row for source in SOURCES for row in source()]
    for number, row in enumerate(wanted, 1):
        before = known.get((row.system, row.row))
        result = {k: "" if v is None else str(v) for k, v in measure(row, before).items()}
        if before is None:
            counts = f"{result['params']} {result['params_verdict']}, {result['GMACs']} G {result['GMACs_verdict']}"
            print(f"{number}/{len(wanted)} {row.system} {row.row}: {counts}", file=sys.stderr, flush=True)
        rows.append(result)
        write_csv(args.csv, [*rows, *(known[k] for k in known if k not in {(r["system"], r["row"]) for r in rows})])
    write_csv(args.csv, rows)
    write_document(args.document, rows)
    picture(args.picture, rows)
    print(f"parameters.py: {len(rows)} rows in {args.csv}, tables in {args.document}, picture {args.picture}")


if __name__ == "__main__":
    main()

"""All mechanisms in one host on the handwritten digits, and a published host with its own attention and with softmax.

    python benchmarks/digits.py                     # everything, three seeds; goes on where it stopped
    python benchmarks/digits.py --only mixers --seeds 0 --epochs 2

Rows go to ``benchmarks/results/digits-DEVICE-torchVERSION.csv`` as soon as a run ends, and rows that the file has are
skipped; the tables of ``docs/learning.md`` are written anew after each. Training is ``train.py``'s own, with its
recipe for the digits.
"""

import argparse
import csv
import re
import statistics
import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import visionattn
from visionattn._files import atomic_write, replacing
from visionattn.training import cli

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ["table", "name", "seed", "epochs", "top1", "best_top1", "loss", "parameters", "torch", "device"]
BEGIN, END = "<!-- benchmarks/digits.py writes from here -->", "<!-- to here -->"
GRID = (8, 8)

# What each mixer needs beside dim and num_heads on an 8 x 8 grid. `nin` is a whole block of its own residuals and norm.
MIXERS = {
    "softmax": {},
    "agent": dict(grid=GRID, agent_num=16, num_prefix_tokens=0),
    "graph_transformer": dict(grid=GRID),
    "halo": dict(grid=GRID, block_size=4, halo_size=1, proj=True),
    "inline": dict(grid=GRID, num_prefix_tokens=0),
    "mala": dict(grid=GRID),
    "moh": {},
    "neighborhood": dict(grid=GRID, kernel_size=5),
    "nin": dict(seq_len=64, d_ffn=128),
}
WITHOUT_HEADS = ("nin",)

# the hosts at 64 px: (label, model, arguments of timm.create_model)
HOSTS = [
    ("test_mala", "test_mala", {}),
    ("test_mala, linear attention in all stages", "test_mala", dict(attn_type="linear")),
    ("test_mala, softmax in all stages", "test_mala", dict(attn_type="softmax")),
]


class SoftmaxAttention(nn.Module):
    """Plain softmax attention in a mixer's interface."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention(mixer: str) -> type[nn.Module]:
    """The class that timm's VisionTransformer builds in the place of its attention."""

    class Attention(nn.Module):
        def __init__(self, dim: int, num_heads: int, **kwargs):
            super().__init__()
            heads = {} if mixer in WITHOUT_HEADS else dict(num_heads=num_heads)
            build = SoftmaxAttention if mixer == "softmax" else lambda **kw: visionattn.create_module(mixer, **kw)
            self.mixer = build(dim=dim, **heads, **MIXERS[mixer])

        def forward(self, x: torch.Tensor, attn_mask=None, is_causal: bool = False) -> torch.Tensor:
            return self.mixer(x, GRID)

    return Attention


@register_model
def digits_vit(pretrained: bool = False, mixer: str = "softmax", **kwargs) -> nn.Module:
    """timm's VisionTransformer of 8 x 8 patches, 64 wide, 4 blocks, whose attention is a mixer of the registry."""
    args = dict(
        img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2, class_token=False,
        global_pool="avg", attn_layer=attention(mixer),
    )  # fmt: skip
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("pretrained") and k != "cache_dir"}
    model = VisionTransformer(**args | kwargs)
    model.pretrained_cfg = model.default_cfg = timm.models.PretrainedCfg(
        input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, first_conv="patch_embed.proj", classifier="head"
    ).to_dict()
    return model


def runs() -> list[tuple[str, str, str, int, dict]]:
    """(table, name, model, image size, arguments of the model) of every row."""
    mixers = [("mixers", name, "digits_vit", 32, dict(mixer=name)) for name in MIXERS]
    return mixers + [("hosts", label, model, 64, kwargs) for label, model, kwargs in HOSTS]


def train(model: str, size: int, kwargs: dict, seed: int, epochs: int) -> dict:
    """One run of train.py in this process; its last row."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--config", str(ROOT / "configs/train/digits.yaml"), "--model", model, "--img-size", str(size)]
        argv += ["--seed", str(seed), "--epochs", str(epochs), "--output", folder, "--threads", "1"]
        if kwargs:
            argv += ["--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
        if cli.main(argv) != 0:
            raise SystemExit(f"digits.py: the run of {model} with {kwargs} failed, see above")
        summary = next(Path(folder).rglob("summary.csv"))
        rows = list(csv.DictReader(summary.open()))
    if len(rows) != epochs:  # a signal stops a run with its state saved, and that is no failure to train.py
        raise SystemExit(f"digits.py: the run of {model} with {kwargs} was stopped; start again to go on from here")
    top1 = [float(row["eval_top1"]) for row in rows if row["eval_top1"]]
    count = sum(p.numel() for p in timm.create_model(model, num_classes=10, **kwargs).parameters())
    return dict(
        top1=top1[-1], best_top1=max(top1), loss=float(rows[-1]["eval_loss"]), parameters=count,
        torch=torch.__version__, device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip


def table(rows: list[dict], which: str, baseline: str) -> str:
    """Markdown: mean and range of the last epoch's top-1 over the seeds, and the distance to the baseline's mean."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["table"] == which:
            groups.setdefault(row["name"], []).append(row)
    means = {name: statistics.mean(float(r["top1"]) for r in group) for name, group in groups.items()}
    lines = ["| | parameters | top-1, % (mean of seeds) | lowest .. highest | against softmax | seeds |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, group in groups.items():
        top1 = [float(r["top1"]) for r in group]
        against = f"{means[name] - means[baseline]:+.2f}" if baseline in means else ""
        against = "" if name == baseline else against
        spread = f"{means[name]:.2f} | {min(top1):.2f} .. {max(top1):.2f}"
        lines.append(f"| {name} | {int(group[0]['parameters']):,} | {spread} | {against} | {len(group)} |")
    return "\n".join(lines)


def write_tables(rows: list[dict], document: Path) -> None:
    """Puts both tables between the marks of the document, with what made them."""
    made = sorted({f"torch {r['torch']} on {r['device']}, {r['epochs']} epochs" for r in rows})
    text = f"\nMade with {'; '.join(made)}.\n\n"
    titles = {"mixers": "One host, all mechanisms", "hosts": "MAViT's own attention and softmax"}
    for which, baseline in (("mixers", "softmax"), ("hosts", "test_mala, softmax in all stages")):
        there = any(row["table"] == which for row in rows)
        text += f"### {titles[which]}\n\n{table(rows, which, baseline) if there else 'Not run yet.'}\n\n"
    old = document.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"digits.py: {document} has no place for the tables, between {BEGIN!r} and {END!r}")
    atomic_write(document, re.sub(f"{BEGIN}.*{END}", lambda m: f"{BEGIN}\n{text}{END}", old, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", choices=("mixers", "hosts"), help="one of the two tables")
    parser.add_argument("--names", nargs="+", help="these rows alone, by the names in the tables")
    parser.add_argument("--csv", type=Path, help="rows; benchmarks/results/digits-DEVICE-torchVERSION.csv by default")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/learning.md")
    args = parser.parse_args()
    known = [name for _, name, *_ in runs()]
    if unknown := set(args.names or ()).difference(known):
        parser.error(f"--names {' '.join(sorted(unknown))}: the tables have {', '.join(known)}")
    if args.csv is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        label = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        args.csv = ROOT / "benchmarks/results" / f"digits-{label}-torch{torch.__version__.partition('+')[0]}.csv"
    rows = list(csv.DictReader(args.csv.open())) if args.csv.exists() else []
    done = {(r["table"], r["name"], int(r["seed"]), int(r["epochs"])) for r in rows}
    for seed in args.seeds:
        for which, name, model, size, kwargs in runs():
            wanted = args.only in (None, which) and (args.names is None or name in args.names)
            if (which, name, seed, args.epochs) in done or not wanted:
                continue
            print(f"digits.py: {which}, {name}, seed {seed}", file=sys.stderr, flush=True)
            row = dict(table=which, name=name, seed=seed, epochs=args.epochs)
            rows.append(row | train(model, size, kwargs, seed, args.epochs))
            with replacing(args.csv) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
            write_tables(rows, args.document)
    if rows:
        write_tables(rows, args.document)
    print(f"digits.py: {args.csv} and {args.document} hold {len(rows)} runs", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Draws the pictures of docs/maps.md: every mechanism's attention on a photograph, and what trained models look at.

    python benchmarks/attention_pictures.py                     # all, into docs/pictures/
    python benchmarks/attention_pictures.py --only mechanisms

``mechanisms`` has weights drawn at random (seed 0): it shows where a mechanism can look and how its weights fall, not
what a trained network attends to. ``digits`` has the weights that come along, on a digit that was held out.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

import visionattn  # noqa: F401  registers the models
from visionattn._files import atomic_write
from visionattn.cli.images import Subject, sample
from visionattn.cli.maps import seen_by, seen_by_all
from visionattn.maps import AttentionMap, attention_maps, rollout
from visionattn.models._shipped import weights_folder
from visionattn.plots.maps import grid_of, overlay

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
POINT = (0.55, 0.45)
SMALL = dict(num_classes=10, img_size=224)
SWIN = dict(embed_dim=16, num_heads=(2, 4, 8, 16), depths=(2, 2, 2, 2), **SMALL)

# label: model, its arguments, the layer, what is drawn of it
MECHANISMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "softmax (timm's ViT)": ("test_vit", dict(patch_size=8, **SMALL), "blocks.0.attn", "query"),
    "shifted window (Swin)": ("agent_swin_tiny", dict(attn_type="BBBB", **SWIN), "layers.1.blocks.1.attn", "query"),
    "stripe (CSWin)": ("agent_cswin_tiny", dict(attn_type="BBBB", **SWIN), "stage2.0.attns.1", "query"),
    "reduced keys (PVT)": ("agent_pvt_tiny", dict(attn_type="BBBB", **SMALL), "block1.0.attn", "query"),
    "halo": ("test_halo", {}, "stages.0.0.attn", "query"),
    "neighbourhood (NAT)": ("test_nat", dict(kernel_size=7), "levels.1.blocks.0.attn", "query"),
    "dilated (DiNAT)": (
        "test_nat", dict(kernel_size=5, dilations=((1,), (1, 4), (1, 1), (1,))), "levels.1.blocks.1.attn", "query",
    ),
    "aggregated (TransNeXt)": ("test_moh_vit", SMALL, "stages.1.blocks.0.attn", "query"),
    "mixture of heads: gate of a head": ("test_moh_vit", SMALL, "stages.1.blocks.0.attn", "gate of a head"),
    "agent": ("test_agent_deit", SMALL, "blocks.0.attn", "query"),
    "InLine (signed)": ("test_inline_deit", SMALL, "blocks.0.attn", "query"),
    "MALA (signed)": ("test_mala", {}, "layers.1.blocks.0.attn", "query"),
    "graph of the grid": ("test_graph_vit", dict(img_size=224, patch_size=8), "layers.0.attention", "query"),
    "graph of 9 nearest": (
        "graph_vit_knn_tiny_patch16_224", dict(depth=2, embed_dim=64, num_heads=4, patch_size=8),
        "layers.0.attention", "query",
    ),
    "ELA (mask)": ("test_ela", {}, "layer1.0.se.module", "whole"),
    "ULSAM (mask)": ("test_ulsam", {}, "blocks.2.1", "whole"),
    "NiNformer (gate)": ("test_ninformer", dict(img_size=224, patch_size=8), "model.0.mgu", "whole"),
}  # fmt: skip
DIGITS = (
    "test_agent_deit", "test_agent_swin", "test_inline_deit", "test_inline_swin", "test_mala", "test_moh_vit",
    "test_halo", "test_nat", "test_graph_vit", "test_ela", "test_ulsam", "test_ninformer",
)  # fmt: skip


def drawn(model: nn.Module) -> nn.Module:
    """Every matrix of the model at random, outputs about as large as inputs: as initialised, all logits are near 0."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            fan = p[0].numel()
            p.data.copy_(torch.randn(p.shape, generator=generator) * fan**-0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # the last ones of blocks start as zeros
    return model.eval()


def subject(name: str, weights: str, **kwargs: Any) -> Subject:
    model = timm.create_model(name, **kwargs).eval()
    data = timm.data.resolve_data_config({}, model=model)
    if weights == "random":
        data |= {"input_size": (3, 224, 224), "crop_pct": 1.0}
    return Subject(name, model, weights, data, torch.device("cpu"), None)


def panel(amap: AttentionMap, what: str) -> Any:
    """(h, w) of one layer's map."""
    if what == "gate of a head":
        return amap.gates[0, -1].unflatten(0, amap.query_grid).numpy()
    return seen_by(amap, POINT) if what == "query" else seen_by_all(amap)


def mechanisms() -> bytes:
    photo = sample("china")
    figure, axes = grid_of(len(MECHANISMS) + 1, f"random weights, scikit-learn's photograph, query at {POINT}", 6)
    for axis, (label, (name, kwargs, layer, what)) in zip(axes[1:], MECHANISMS.items(), strict=True):
        found = subject(name, "random", **kwargs)
        x = found.tensor(photo)
        gated = what == "gate of a head"
        amap = attention_maps(drawn(found.model), x, layer, heads=None if gated else "mean", values=False)[0]
        image = found.shown(x)
        overlay(axis, image, panel(amap, what), amap.kind in ("signed", "gate"))
        mark(axis, image, what == "query")
        axis.set_title(label, fontsize=8)
        print(label, amap)
    axes[0].imshow(image, extent=(0, 224, 224, 0))
    mark(axes[0], image, True)
    axes[0].set_title("input", fontsize=8)
    axes[0].axis("off")
    return jpeg(figure)


def mark(axis: Any, image: Any, wanted: bool) -> None:
    if wanted:
        y, x = POINT[0] * image.shape[0], POINT[1] * image.shape[1]
        axis.plot([x], [y], "o", markersize=6, markerfacecolor="none", markeredgecolor="cyan", markeredgewidth=1.3)


def digits() -> bytes:
    """Rollout of every model whose weights come along; the first layer's mask or gate where no tokens are mixed."""
    digit = sample("digit-3")
    here = [name for name in DIGITS if (weights_folder() / f"{name}.digits.safetensors").is_file()]
    print("not here:", ", ".join(name for name in DIGITS if name not in here) or "none")
    figure, axes = grid_of(len(here), "weights trained on the digits: rollout, or a mask", 6)
    for axis, name in zip(axes, here, strict=True):
        found = subject(f"{name}.digits", "digits", pretrained=True)
        x = found.tensor(digit)
        with torch.no_grad():
            chances = found.model(x)[0].softmax(0)
        try:
            flow = rollout(found.model, x)
            heat, what, signed = flow.on_image()[0].numpy(), f"rollout of {len(flow.layers)} layers", False
        except ValueError:
            amap = attention_maps(found.model, x, 0, heads="mean")[0]
            heat, what, signed = seen_by_all(amap), f"{amap.mechanism}, {amap.kind}", amap.kind == "gate"
        overlay(axis, found.shown(x), heat, signed)
        axis.set_title(f"{name}\n{what}\n{int(chances.argmax())} ({float(chances.max()):.2f})", fontsize=7)
        print(name, int(chances.argmax()), what)
    return jpeg(figure)


def jpeg(figure: Any, quality: int = 82) -> bytes:
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=75, format="png")
    Image.open(raw).convert("RGB").save(small, "JPEG", quality=quality, optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("mechanisms", "digits"))
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in (("mechanisms", mechanisms), ("digits", digits)):
        if args.only in (None, name):
            path = args.out / f"maps-{name}.jpg"
            atomic_write(path, make())
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

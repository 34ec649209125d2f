"""Where a model's attention goes: numbers, and a picture.

    python examples/attention_maps.py photo.jpg --model vit_tiny_patch16_224 --pretrained
    python examples/attention_maps.py --tiny                   # a trained test model on a digit that comes along

The command `visionattn maps` draws more (docs/maps.md); this is the library beneath it.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image

import visionattn
from visionattn.maps import rollout
from visionattn.plots.maps import maps_figure, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any model of timm or of the zoo")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, which it fetches")
    parser.add_argument("--output", type=Path, default=Path("maps.png"))
    parser.add_argument("--tiny", action="store_true", help="test_agent_deit, trained on handwritten digits")
    args = parser.parse_args()
    if not args.tiny and args.image is None:
        parser.error("give a picture, or --tiny")

    name, pretrained = ("test_agent_deit.digits", True) if args.tiny else (args.model, args.pretrained)
    model = timm.create_model(name, pretrained=pretrained).eval()
    config = timm.data.resolve_data_config(model=model)
    if args.tiny:
        from sklearn.datasets import load_digits

        picture = Image.fromarray((load_digits().images[3] * 15.9).astype("uint8"))
    else:
        picture = Image.open(args.image)
    x = timm.data.create_transform(**config, is_training=False)(picture.convert("RGB"))[None]

    maps = visionattn.attention_maps(model, x, heads="mean")
    for found in maps:
        print(f"{found.layer}: {found.mechanism}, {found.kind}, map {tuple(found.map.shape)}")
    flow = rollout(model, x)
    heat = flow.on_image()[0]  # (H, W)
    y, column = divmod(int(heat.argmax()), heat.shape[1])
    print(f"rollout over {len(flow.layers)} layers is largest at row {y}, column {column} of {tuple(heat.shape)}")

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    shown = (x[0] * std + mean).clamp(0, 1).movedim(0, -1).numpy()
    save(maps_figure(shown, [("rollout", heat.numpy(), False)], name), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

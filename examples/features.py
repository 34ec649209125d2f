"""Logits and feature maps of a backbone, through timm.

python examples/features.py                      # halo_h1, random weights
python examples/features.py --model mala_tiny --size 224
python examples/features.py --tiny               # a test model with weights that come along, on a digit
"""

import argparse

import timm
import torch

import visionattn  # noqa: F401  registers the zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="halo_h1", help="a name of `visionattn list`")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--tiny", action="store_true", help="test_agent_swin, trained on handwritten digits")
    args = parser.parse_args()

    if args.tiny:
        from sklearn.datasets import load_digits

        name, overrides = "test_agent_swin.digits", {"pretrained": True}
        digits = load_digits()  # 8 x 8 pixels; the first one is a zero
        image = torch.from_numpy(digits.images[:1]).float()[:, None].expand(1, 3, 8, 8) / 16  # grey, in [0, 1]
    else:
        name, overrides = args.model, {}
        image = torch.rand(1, 3, args.size, args.size)

    model = timm.create_model(name, **overrides).eval()
    config = timm.data.resolve_data_config(model=model)
    height, width = config["input_size"][1:] if args.tiny else image.shape[2:]
    image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    image = (image - mean) / std

    with torch.no_grad():
        logits = model(image)
        print(f"{name}: logits {tuple(logits.shape)}, the largest is class {int(logits.argmax())}")
        print(f"pooled features {tuple(model.forward_head(model.forward_features(image), pre_logits=True).shape)}")

        backbone = timm.create_model(name, features_only=True, **overrides).eval()
        for info, features in zip(backbone.feature_info.get_dicts(), backbone(image), strict=True):
            print(f"{info['module']}: stride {info['reduction']}, {tuple(features.shape)}")


if __name__ == "__main__":
    main()

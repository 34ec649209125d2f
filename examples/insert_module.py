"""A channel module put into a network that knows nothing of it, and trained for a moment.

python examples/insert_module.py                           # ELA-B into timm's ResNet-50
python examples/insert_module.py --host mobilenetv3_small_100 --module ulsam --at block
python examples/insert_module.py --tiny                    # into timm's test_resnet, on a CPU in a second
"""

import argparse

import timm
import torch

import visionattn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="resnet50", help="a convolutional network of timm")
    parser.add_argument("--module", default="ela_b", help=f"one of {', '.join(visionattn.list_modules('channel'))}")
    parser.add_argument("--at", default="conv", choices=("conv", "block", "stage"))
    parser.add_argument("--tiny", action="store_true", help="timm's smallest residual network")
    args = parser.parse_args()

    model = timm.create_model("test_resnet" if args.tiny else args.host, num_classes=10)
    weights = model.state_dict()  # a checkpoint from before
    print(visionattn.insert(model, args.module, at=args.at))

    missing, unexpected = model.load_state_dict(weights, strict=False)
    print(f"a checkpoint from before loads: {len(unexpected)} names unexpected, {len(missing)} of the modules missing")

    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

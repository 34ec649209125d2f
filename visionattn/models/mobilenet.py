"""MobileNetV1 and V2 as hosts of channel modules: timm's EfficientNet class, its layers by the papers' numbers.

Layer 1 is the first 3x3 convolution; layers 2 to 14 of V1 are its depthwise-separable pairs, layers 2 to 18 of V2 its
inverted residual blocks (the numbering in which ULSAM's published positions and counts agree).
"""

import re
from functools import partial
from typing import Any

import torch
from timm.models.efficientnet import EfficientNet
from torch import nn

from visionattn._timm import decode_arch_def, round_channels

V1_ARCH = [
    ["dsa_r1_k3_s1_c64"],
    ["dsa_r2_k3_s2_c128"],
    ["dsa_r2_k3_s2_c256"],
    ["dsa_r6_k3_s2_c512"],
    ["dsa_r2_k3_s2_c1024"],
]
V2_ARCH = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]
# a few blocks with both kinds of positions, for tests and demonstrations
TEST_ARCH = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e4_c32"],
    ["ir_r2_k3_s2_e4_c48"],
    ["ir_r2_k3_s2_e4_c64"],
    ["ir_r2_k3_s2_e4_c96"],
]

_V1_NAMES = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
_V2_NAMES = {"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "6": "conv_pwl", "7": "bn3"}


def mobilenet_args(arch: list[list[str]], width: float = 1.0, head: int = 1280, act: str = "relu6") -> dict[str, Any]:
    """Arguments of timm's EfficientNet for one of the architectures above; ``head=0`` is V1, which has no last 1x1."""
    act_layer = {"relu": nn.ReLU, "relu6": nn.ReLU6}[act]
    round_chs_fn = partial(round_channels, multiplier=width)
    return dict(
        block_args=decode_arch_def(arch),
        num_features=max(head, round_chs_fn(head)) if head else 0,
        stem_size=32,
        round_chs_fn=round_chs_fn,
        act_layer=act_layer,
    )


def layer_positions(model: EfficientNet) -> dict[int, tuple[int, int]]:
    """Layer number (2 and up) to its (stage, block) in ``model.blocks``."""
    places = [(s, b) for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    return dict(enumerate(places, start=2))


def from_features_names(
    state_dict: dict[str, torch.Tensor], model: EfficientNet, places: dict[int, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Renames ``features.N.*`` (torchvision's way, which the authors' MobileNets follow) to timm's ``blocks.S.B.*``."""
    if not any(name.startswith("features.") for name in state_dict):
        return state_dict
    last = max(places) + 1  # V2's last 1x1 is features.{last - 1}, or 'conv'
    out = {}
    for name, value in state_dict.items():
        name = re.sub(r"^classifier\.1\.", "classifier.", name)
        if match := re.match(rf"^(?:features\.{last - 1}|conv)\.([01])\.(.+)$", name):
            name = f"{('conv_head', 'bn2')[int(match[1])]}.{match[2]}"
        elif match := re.match(r"^features\.0\.([01])\.(.+)$", name):
            name = f"{('conv_stem', 'bn1')[int(match[1])]}.{match[2]}"
        elif (match := re.match(r"^features\.(\d+)\.(.+)$", name)) and int(match[1]) + 1 in places:
            stage, block = places[int(match[1]) + 1]
            name = f"blocks.{stage}.{block}.{_block_name(match[2], model.blocks[stage][block])}"
        out[name] = value
    return out


def _block_name(name: str, block: nn.Module) -> str:
    """The name inside a block: ``conv.3.weight`` (V2) or ``3.weight`` (V1) to ``conv_dw.weight``."""
    if isinstance(block, nn.Sequential):  # [layer, inserted module]
        index, rest = name.split(".", 1)
        return f"{index}.{_block_name(rest, block[int(index)])}"
    if match := re.match(r"^conv\.6\.(conv|gn)\.(.+)$", name):  # ELA between the depthwise and the last 1x1
        return f"se.{match[1]}.{match[2]}"
    if match := re.match(r"^(conv\.)?(\d)\.(.+)$", name):
        index = match[2]
        if not match[1]:
            return f"{_V1_NAMES[index]}.{match[3]}"
        if hasattr(block, "conv_pwl"):
            shifted = index in ("7", "8") and isinstance(block.se, nn.Module) and not isinstance(block.se, nn.Identity)
            return f"{_V2_NAMES[str(int(index) - 1) if shifted else index]}.{match[3]}"
        return f"{_V1_NAMES[index]}.{match[3]}"
    return name

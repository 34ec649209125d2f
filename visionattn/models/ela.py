"""ResNet and MobileNetV2 with Efficient Local Attention (ELA).

Paper: 'ELA: Efficient Local Attention for Deep Convolutional Neural Networks' (2024),
https://arxiv.org/abs/2403.01123. Positions are those of the authors' code; the position behind the paper's ImageNet
table is not known, so no match with that table is claimed.
"""

import re
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from visionattn._timm import InvertedResidual, generate_default_cfgs, register_model
from visionattn.layers.ela import ELA
from visionattn.layers.residual import Residual

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._shipped import digits_cfgs
from .mobilenet import V2_ARCH, from_features_names, layer_positions, mobilenet_args

__all__ = ["ElaMobileNetV2", "ElaResNet"]

POSITIONS = ("conv", "block", "stage")


class ElaBasicBlock(BasicBlock):
    """timm's BasicBlock without dilation, as the authors' trunk at output stride 16 has it."""

    def __init__(self, *args: Any, dilation: int = 1, first_dilation: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)


class ElaResNet(ResNet):
    """ResNet with ELA in every residual block, or after its stages.

    Args:
        version: of :class:`visionattn.layers.ELA`.
        position: ``'conv'`` (after the last 3x3 convolution with its norm and, in a bottleneck, its activation: the
            authors' code), ``'block'`` (after the last norm of the block) or ``'stage'`` (after each stage).
        residual: ``y = ELA(y) + y``, the authors' ResNet, or ``y = ELA(y)``.
        **kwargs: of timm's ResNet.

    Raises:
        ValueError: for an unknown position or version, or channels that its norm groups do not divide.
    """

    def __init__(
        self,
        version: str = "b",
        position: str = "conv",
        residual: bool = True,
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        super().__init__(device=device, dtype=dtype, **kwargs)
        if position not in POSITIONS:
            raise ValueError(f"ELA: position={position!r} is unknown: use one of {', '.join(POSITIONS)}")

        def attention(channels: int) -> nn.Module:
            module = ELA(channels, version, device=device, dtype=dtype)
            return Residual(module) if residual else module

        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                if position == "conv" and isinstance(block, Bottleneck):
                    # timm applies this slot right after the activation of conv2
                    block.aa = nn.Sequential(block.aa, attention(block.conv3.in_channels))
                elif position != "stage":
                    block.se = attention(last.num_features)
            if position == "stage":
                stage.append(attention(last.num_features))


class ElaMobileNetV2(EfficientNet):
    """MobileNetV2 with ELA between the depthwise and the last 1x1 convolution of every expanded block.

    Args:
        version: of :class:`visionattn.layers.ELA`.
        residual: ``y = ELA(y) + y``; the authors' MobileNetV2 multiplies only.
        **kwargs: of timm's EfficientNet.

    Raises:
        ValueError: for a version whose norm groups do not divide a width (ELA-T on 144 channels).
    """

    def __init__(self, version: str = "b", residual: bool = False, device=None, dtype=None, **kwargs: Any):
        super().__init__(device=device, dtype=dtype, **kwargs)
        for block in self.blocks.modules():
            if isinstance(block, InvertedResidual):
                module = ELA(block.conv_pwl.in_channels, version, device=device, dtype=dtype)
                block.se = Residual(module) if residual else module


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers and renames the authors' ``feat0`` / ``feat1`` (ResNet) and ``features.N`` (MobileNetV2)."""
    state_dict = unwrap_state_dict(state_dict)
    if isinstance(model, ElaMobileNetV2):
        return from_features_names(state_dict, model, layer_positions(model))
    own = model.state_dict()
    out = {}
    for name, value in state_dict.items():
        if match := re.match(r"^(layer\d\.\d+)\.feat\d\.(conv|gn)\.(.+)$", name):
            block, rest = match[1], f"{match[2]}.{match[3]}"
            candidates = [f"{block}.{slot}.{rest}" for slot in ("se", "se.module", "aa.1", "aa.1.module")]
            name = next((c for c in candidates if c in own), name)
        out[name] = value
    return out


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2403.01123",
        "paper_name": "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        "origin_url": "https://github.com/Xuwei86/ELA_Code",
        **kwargs,
    }


_mobilenet_cfg = partial(_cfg, first_conv="conv_stem", classifier="classifier")

default_cfgs = generate_default_cfgs(
    {
        "ela_t_resnet18.untrained": _cfg(),
        "ela_b_resnet18.untrained": _cfg(),
        "ela_s_resnet18.untrained": _cfg(),
        "ela_l_resnet18.untrained": _cfg(),
        "ela_t_resnet50.untrained": _cfg(),
        "ela_b_resnet50.untrained": _cfg(),
        "ela_s_resnet50.untrained": _cfg(),
        "ela_l_resnet50.untrained": _cfg(),
        "ela_t_resnet101.untrained": _cfg(),
        "ela_b_resnet101.untrained": _cfg(),
        "ela_s_resnet101.untrained": _cfg(),
        "ela_l_resnet101.untrained": _cfg(),
        "ela_b_mobilenetv2.untrained": _mobilenet_cfg(),
        "ela_s_mobilenetv2.untrained": _mobilenet_cfg(),
        "ela_l_mobilenetv2.untrained": _mobilenet_cfg(),
        **digits_cfgs("test_ela", _cfg(input_size=(3, 96, 96), pool_size=(3, 3), first_conv="conv1.0"), 32),
    }
)

_RESNETS = {
    "resnet18": dict(block=ElaBasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
}


def _create_resnet(variant: str, pretrained: bool, **kwargs: Any) -> ElaResNet:
    return build_model_with_cfg(ElaResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _ela_resnet(variant: str, pretrained: bool, **kwargs: Any) -> ElaResNet:
    """``ela_{version}_{host}`` names both arguments."""
    _, version, host = variant.split("_")
    return _create_resnet(variant, pretrained, **{**_RESNETS[host], "version": version, **kwargs})


def _ela_mobilenetv2(variant: str, pretrained: bool, **kwargs: Any) -> ElaMobileNetV2:
    model_args = dict(mobilenet_args(V2_ARCH), version=variant.split("_")[1], drop_rate=0.1)
    return build_model_with_cfg(
        ElaMobileNetV2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **dict(model_args, **kwargs),
    )


@register_model
def ela_t_resnet18(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-T."""
    return _ela_resnet("ela_t_resnet18", pretrained, **kwargs)


@register_model
def ela_b_resnet18(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-B."""
    return _ela_resnet("ela_b_resnet18", pretrained, **kwargs)


@register_model
def ela_s_resnet18(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-S."""
    return _ela_resnet("ela_s_resnet18", pretrained, **kwargs)


@register_model
def ela_l_resnet18(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-L."""
    return _ela_resnet("ela_l_resnet18", pretrained, **kwargs)


@register_model
def ela_t_resnet50(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-T."""
    return _ela_resnet("ela_t_resnet50", pretrained, **kwargs)


@register_model
def ela_b_resnet50(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-B."""
    return _ela_resnet("ela_b_resnet50", pretrained, **kwargs)


@register_model
def ela_s_resnet50(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-S."""
    return _ela_resnet("ela_s_resnet50", pretrained, **kwargs)


@register_model
def ela_l_resnet50(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-L."""
    return _ela_resnet("ela_l_resnet50", pretrained, **kwargs)


@register_model
def ela_t_resnet101(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-T."""
    return _ela_resnet("ela_t_resnet101", pretrained, **kwargs)


@register_model
def ela_b_resnet101(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-B."""
    return _ela_resnet("ela_b_resnet101", pretrained, **kwargs)


@register_model
def ela_s_resnet101(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-S."""
    return _ela_resnet("ela_s_resnet101", pretrained, **kwargs)


@register_model
def ela_l_resnet101(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-L."""
    return _ela_resnet("ela_l_resnet101", pretrained, **kwargs)


@register_model
def ela_b_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-B. (ELA-T can't be built: 144 channels, 32 norm groups.)"""
    return _ela_mobilenetv2("ela_b_mobilenetv2", pretrained, **kwargs)


@register_model
def ela_s_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-S."""
    return _ela_mobilenetv2("ela_s_mobilenetv2", pretrained, **kwargs)


@register_model
def ela_l_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-L, the version of the authors' file."""
    return _ela_mobilenetv2("ela_l_mobilenetv2", pretrained, **kwargs)


@register_model
def test_ela(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """A small ResNet with ELA-B for tests and demonstrations."""
    model_args = dict(
        block=ElaBasicBlock,
        layers=(1, 1, 1, 1),
        channels=(32, 48, 64, 96),
        stem_width=16,
        stem_type="deep",
        avg_down=True,
        version="b",
    )
    return _create_resnet("test_ela", pretrained, **dict(model_args, **kwargs))

"""MobileNetV1 and V2 with ULSAM, after or in place of some of their layers.

Paper: 'ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks' (WACV 2020),
https://arxiv.org/abs/2006.15102. The authors released the module, not the networks: positions are the ones whose counts
give the published parameters and FLOPs (layers are numbered as in ``mobilenet.py``).
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.efficientnet import EfficientNet
from torch import nn

from visionattn._timm import generate_default_cfgs, register_model
from visionattn.layers.ulsam import ULSAM

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._shipped import digits_cfgs
from .mobilenet import TEST_ARCH, V1_ARCH, V2_ARCH, from_features_names, layer_positions, mobilenet_args

__all__ = ["UlsamMobileNet"]


class UlsamMobileNet(EfficientNet):
    """MobileNet with ULSAM modules.

    Args:
        insert_after: numbers of the layers that a module follows.
        replace: numbers of the layers that a module takes the place of (they must keep channels and size).
        groups: subspaces g of every module.
        form: see :class:`visionattn.layers.ULSAM`.
        **kwargs: of timm's EfficientNet.

    Raises:
        ValueError: for a layer that does not exist or can't be replaced, or groups that do not divide its channels.
    """

    def __init__(
        self,
        insert_after: tuple[int, ...] = (),
        replace: tuple[int, ...] = (),
        groups: int = 4,
        form: str = "released",
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        super().__init__(device=device, dtype=dtype, **kwargs)
        dd = {"device": device, "dtype": dtype}
        self.layer_places = layer_positions(self)
        unknown = sorted(n for n in {*insert_after, *replace} if n not in self.layer_places)
        if unknown or set(insert_after) & set(replace):
            raise ValueError(
                f"ULSAM: insert_after={tuple(insert_after)}, replace={tuple(replace)}: use layers 2 to "
                f"{max(self.layer_places)}, each in one of the two"
            )
        for n in sorted({*insert_after, *replace}):
            stage, index = self.layer_places[n]
            block = self.blocks[stage][index]
            channels = block.feature_info("bottleneck")["num_chs"]
            if n in replace and not _keeps_shape(block, channels):
                raise ValueError(
                    f"ULSAM: layer {n} changes channels or size and can't be replaced: insert after it instead"
                )
            module = ULSAM(channels, groups=groups, form=form, **dd)
            self.blocks[stage][index] = module if n in replace else nn.Sequential(block, module)


def _keeps_shape(block: nn.Module, channels: int) -> bool:
    return block.conv_dw.stride == (1, 1) and getattr(block, "conv_pw", block.conv_dw).in_channels == channels


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: UlsamMobileNet) -> dict[str, torch.Tensor]:
    """Opens wrappers and renames ``features.N`` layers."""
    return from_features_names(unwrap_state_dict(state_dict), model, model.layer_places)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2006.15102",
        "paper_name": "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        "origin_url": "https://github.com/Nandan91/ULSAM",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "ulsam_mobilenetv1_100.untrained": _cfg(),
        "ulsam_mobilenetv1_075.untrained": _cfg(),
        "ulsam_mobilenetv1_050.untrained": _cfg(),
        "ulsam_mobilenetv2_100.untrained": _cfg(),
        **digits_cfgs("test_ulsam", _cfg(input_size=(3, 96, 96), pool_size=(3, 3)), 32),
    }
)


def _create_ulsam(
    variant: str, pretrained: bool, model_args: dict[str, Any], published: dict[str, Any], **kwargs: Any
) -> UlsamMobileNet:
    """``published`` holds the positions that apply where the caller names none."""
    if kwargs.get("insert_after") is None and kwargs.get("replace") is None:
        kwargs = {**published, **{k: v for k, v in kwargs.items() if k not in ("insert_after", "replace")}}
    for name in ("insert_after", "replace"):
        if isinstance(kwargs.get(name), int):
            raise ValueError(f"ULSAM: {name}={kwargs[name]} is one number: give a tuple of layers, ({kwargs[name]},)")
    kwargs = {k: tuple(v) if k in ("insert_after", "replace") else v for k, v in kwargs.items() if v is not None}
    return build_model_with_cfg(
        UlsamMobileNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **dict(model_args, **kwargs),
    )


@register_model
def ulsam_mobilenetv1_100(pretrained: bool = False, **kwargs: Any) -> UlsamMobileNet:
    """MobileNetV1; without positions a module of 8 subspaces follows layer 12, the best published row (70.92 %)."""
    model_args = mobilenet_args(V1_ARCH, head=0, act="relu")
    return _create_ulsam("ulsam_mobilenetv1_100", pretrained, model_args, dict(insert_after=(12,), groups=8), **kwargs)


@register_model
def ulsam_mobilenetv1_075(pretrained: bool = False, **kwargs: Any) -> UlsamMobileNet:
    """MobileNetV1 of width 0.75; without positions one 384-channel layer is replaced, as published."""
    model_args = mobilenet_args(V1_ARCH, width=0.75, head=0, act="relu")
    return _create_ulsam("ulsam_mobilenetv1_075", pretrained, model_args, dict(replace=(12,)), **kwargs)


@register_model
def ulsam_mobilenetv1_050(pretrained: bool = False, **kwargs: Any) -> UlsamMobileNet:
    """MobileNetV1 of width 0.5; without positions one 256-channel layer is replaced, as published."""
    model_args = mobilenet_args(V1_ARCH, width=0.5, head=0, act="relu")
    return _create_ulsam("ulsam_mobilenetv1_050", pretrained, model_args, dict(replace=(12,)), **kwargs)


@register_model
def ulsam_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> UlsamMobileNet:
    """MobileNetV2; without positions layers 14 and 17 are replaced, as published (71.52 %)."""
    model_args = mobilenet_args(V2_ARCH)
    return _create_ulsam("ulsam_mobilenetv2_100", pretrained, model_args, dict(replace=(14, 17)), **kwargs)


@register_model
def test_ulsam(pretrained: bool = False, **kwargs: Any) -> UlsamMobileNet:
    """A small MobileNetV2 with ULSAM for tests and demonstrations."""
    model_args = mobilenet_args(TEST_ARCH, head=256)
    return _create_ulsam("test_ulsam", pretrained, model_args, dict(insert_after=(8,), replace=(6,)), **kwargs)

"""What the families that live in the four hosts (Agent, InLine ...) share: configurations and construction."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ._checkpoint import build_model_with_cfg
from ._resize import checkpoint_filter_fn
from ._shipped import tag_size
from .cswin import CSWinHost
from .pvt import PVTHost
from .swin import SwinHost
from .vit import ViTHost

PVT_DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
CSWIN_DEPTHS = {"tiny": (2, 4, 18, 1), "small": (3, 6, 29, 2), "base": (3, 6, 29, 2)}

_STEM = {ViTHost: "patch_embed.proj", PVTHost: "patch_embed1.proj", SwinHost: "patch_embed.proj"}
_STEM[CSWinHost] = "stage1_conv_embed.0"


def host_cfg(host: type[nn.Module], size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A pretrained cfg with the authors' evaluation: both sides to int(256 / 224 * size), then a centre crop."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None if host is ViTHost else (size // 32, size // 32),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": _STEM[host],
        "classifier": "head",
        "license": "unknown" if kwargs.get("url") else "apache-2.0",  # the authors state none for their weights
        **kwargs,
    }


def create_host(host: type[nn.Module], variant: str, pretrained: bool, settings: dict, kwargs: dict) -> nn.Module:
    """Builds ``variant``; ``kwargs`` are the user's and win over the variant's ``settings``."""
    kwargs = {**settings, **tag_size(variant, kwargs), **kwargs}
    out_indices = kwargs.pop("out_indices", 3 if host is ViTHost else (0, 1, 2, 3))
    return build_model_with_cfg(
        host,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )

"""Agent Attention in four hosts: DeiT, PVT, Swin and CSWin.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' (ECCV 2024),
https://arxiv.org/abs/2312.08874. Reference: https://github.com/LeapLabTHU/Agent-Attention (no licence; written from the
paper's formulas and measured behaviour, no code taken). Parameter names are the authors', so that their files load.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from visionattn._timm import generate_default_cfgs, register_model

from ._checkpoint import build_model_with_cfg
from ._resize import checkpoint_filter_fn
from .swin import SwinHost


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": _cfg(),
    }
)


def _create_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> SwinHost:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        SwinHost,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    args = dict(
        depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), attn_type="AAAB", agent_num=(9, 16, 49, 49), drop_path_rate=0.2
    )
    return _create_swin("agent_swin_tiny", pretrained, **dict(args, **kwargs))

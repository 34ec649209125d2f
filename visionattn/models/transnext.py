"""TransNeXt, and MoH-ViT: TransNeXt whose attention layers choose heads for every token.

Papers: 'TransNeXt: Robust Foveal Visual Perception for Vision Transformers' (CVPR 2024),
https://arxiv.org/abs/2311.17132; 'MoH: Multi-Head Attention as Mixture-of-Head Attention' (ICML 2025),
https://arxiv.org/abs/2410.11842. The weights of both are Apache-2.0; the names in the authors' files are translated.
"""

import math
import re
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from torch import nn

from visionattn._timm import (
    checkpoint,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
    update_model_input_size,
)
from visionattn.layers.cast import PreNorm, ResidualNorm
from visionattn.layers.moh import set_aux_weights
from visionattn.layers.transnext import (
    AggregatedAttention,
    ContinuousPositionBias,
    ConvGLU,
    CosineAttention,
    OverlapPatchEmbed,
)

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._head import PooledClassifier
from ._shipped import digits_cfgs, tag_size

__all__ = ["TransNeXt"]


class Block(nn.Module):
    """Pre-norm attention and convolutional GLU on tokens (B, N, C) and their grid, each residual."""

    def __init__(self, attn: nn.Module, dim: int, mlp_ratio: float, proj_drop: float, drop_path: float, dd: dict):
        super().__init__()
        self.norm1 = PreNorm(dim, eps=1e-6, operator="block_norm", **dd)
        self.attn = attn
        self.norm2 = ResidualNorm(dim, eps=1e-6, operator="block_norm", **dd)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x, y = self.norm2(x, self.drop_path(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.mlp(y, grid))


class Stage(nn.Module):
    """Patch embedding, blocks, norm; maps (B, C, H, W) in and out."""

    def __init__(self, patch_embed: nn.Module, blocks: list[Block], dim: int, dd: dict):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, grid = self.patch_embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        x = self.norm(x)
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid[0], grid[1])


class TransNeXt(PooledClassifier):
    """TransNeXt image classifier, with routed heads where ``shared_heads`` and ``routed_heads`` say; any input size.

    Args:
        img_size: size (pixels) that the model is for. Other sizes may come; it decides ``pretrain_size``'s default.
        pretrain_size: size in pretraining, to which the position bias is relative; ``img_size`` by default. Weights
            from 224 px that are used at 384 px want ``img_size=384, pretrain_size=224``.
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: of the stages; stages of sr_ratio 1 have full attention,
            the others a window and a pooled map of the grid divided by the ratio.
        window_size: odd side of the windows.
        fixed_pool_size: side of the pooled maps, whatever the input's (linear complexity), instead of sr_ratios.
        shared_heads, routed_heads: of the stages: heads that every token uses, and k, how many of the others; None for
            both is TransNeXt.
        aux_coefficient: weight of the mean load-balance loss (:meth:`visionattn.layers.moh.HeadRouter.pop_aux_loss`).
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, in the blocks, of attention weights.

    Raises:
        ValueError: for stages of different numbers, or heads that do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int | tuple[int, int] | None = None,
        embed_dims: tuple[int, ...] = (72, 144, 288, 576),
        depths: tuple[int, ...] = (5, 5, 22, 5),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        window_size: int = 3,
        fixed_pool_size: int | tuple[int, int] | None = None,
        shared_heads: tuple[int, ...] | None = None,
        routed_heads: tuple[int, ...] | None = None,
        aux_coefficient: float = 0.01,
        qkv_bias: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        none = (None,) * len(depths)
        shared_heads, routed_heads = shared_heads or none, routed_heads or none
        per_stage = dict(
            embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios,
            shared_heads=shared_heads, routed_heads=routed_heads,
        )  # fmt: skip
        for name, values in per_stage.items():
            if len(values) != len(depths):
                raise ValueError(f"TransNeXt: {name}={values} and depths={depths} differ in length: give one a stage")
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        self.drop_rate = drop_rate
        pretrain = self.img_size if pretrain_size is None else to_2tuple(pretrain_size)

        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info = []
        self.stages = nn.ModuleList()
        chans = in_chans
        for i, dim in enumerate(embed_dims):
            reduction = 2 ** (i + 2)
            embed = OverlapPatchEmbed(7 if i == 0 else 3, 4 if i == 0 else 2, chans, dim, **dd)
            common = dict(
                input_resolution=tuple(-(-size // reduction) for size in self.img_size),
                pretrain_size_tokens=tuple(-(-size // reduction) for size in pretrain),
                num_heads=num_heads[i], qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
                shared_head=shared_heads[i], routed_head=routed_heads[i], **dd,
            )  # fmt: skip
            blocks = []
            for j in range(depths[i]):
                if sr_ratios[i] == 1:
                    attn = CosineAttention(dim, **common)
                else:
                    pooled = dict(window_size=window_size, sr_ratio=sr_ratios[i], fixed_pool_size=fixed_pool_size)
                    attn = AggregatedAttention(dim, **pooled, **common)
                blocks.append(Block(attn, dim, mlp_ratios[i], proj_drop_rate, dpr[i][j], dd))
            self.stages.append(Stage(embed, blocks, dim, dd))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
            chans = dim

        self.num_features = chans
        self._make_classifier(num_classes, global_pool, dd)
        set_aux_weights(self, aux_coefficient)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """The published initialisation of every parameter."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, ContinuousPositionBias)):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The released recipe's: position biases, temperatures and query embeddings (and, as ever, vectors)."""
        parts = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in parts)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = len(self.stages) - 1
        if coarse:
            blocks = [(rf"^stages\.{last}\.norm", (99999,)), (r"^stages\.(\d+)", None)]
        else:
            blocks = [
                (r"^stages\.(\d+)\.patch_embed", (-1,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (rf"^stages\.{last}\.norm", (99999,)),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ]
        return dict(stem=r"^stages\.0\.patch_embed", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Records another input size. The weights and the size of pretraining stay: every size goes anyway."""
        if img_size is None or to_2tuple(img_size) == self.img_size:
            return
        self.img_size = to_2tuple(img_size)
        for info, stage in zip(self.feature_info, self.stages, strict=True):
            for block in stage.blocks:
                block.attn.grid = tuple(-(-size // info["reduction"]) for size in self.img_size)
        update_model_input_size(self, self.img_size)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Final features and the outputs of the chosen stages, timm's contract; all of them are normed in any case."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice a ModuleList
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the chosen stages do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        self._keep_stages("stages", max_index + 1, classifier=not (cut or prune_head))
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers and translates the authors' names (``patch_embed1``, ``block1.0``, ``norm1``) to the stages'."""
    translated = {}
    for name, value in unwrap_state_dict(state_dict).items():
        if found := re.match(r"(patch_embed|block|norm)(\d)\.(.*)", name):
            part = "blocks" if found[1] == "block" else found[1]
            name = f"stages.{int(found[2]) - 1}.{part}.{found[3]}"
        translated[name] = value
    return translated


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
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2311.17132",
        "paper_name": "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        **kwargs,
    }


_MOH = dict(
    paper_ids="arXiv:2410.11842",
    paper_name="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    origin_url="https://github.com/SkyworkAI/MoH",
)
_MOH_URL = "https://huggingface.co/Chat-UniVi/MoH-ViT"

default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.untrained": _cfg(),
        "transnext_tiny.untrained": _cfg(),
        "transnext_small.untrained": _cfg(),
        "transnext_base.untrained": _cfg(),
        "moh_vit_small_80.in1k": _cfg(f"{_MOH_URL}-S-80/resolve/main/moh_transnext_small_80.pth", **_MOH),
        "moh_vit_small_75.untrained": _cfg(**_MOH),
        "moh_vit_base_75.in1k": _cfg(f"{_MOH_URL}-B-75/resolve/main/moh_transnext_base_75.pth", **_MOH),
        "moh_vit_base_50.in1k": _cfg(f"{_MOH_URL}-B-50/resolve/main/moh_transnext_base_50.pth", **_MOH),
        **digits_cfgs("test_moh_vit", _cfg(**_MOH, input_size=(3, 96, 96), pool_size=(3, 3)), 32, takes_size=True),
    }
)


def _create_transnext(variant: str, pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        TransNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


_SMALL = dict(embed_dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
_BASE = dict(embed_dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro, 12.8 M parameters (published drop path rate: 0.15)."""
    model_args = dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 15, 2), num_heads=(2, 4, 8, 16))
    return _create_transnext("transnext_micro", pretrained, **dict(model_args, **kwargs))


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Tiny, 28.2 M parameters (published drop path rate: 0.25)."""
    model_args = dict(embed_dims=(72, 144, 288, 576), depths=(2, 2, 15, 2), num_heads=(3, 6, 12, 24))
    return _create_transnext("transnext_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Small, 49.7 M parameters (published drop path rate: 0.45)."""
    return _create_transnext("transnext_small", pretrained, **dict(_SMALL, **kwargs))


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Base, 89.7 M parameters (published drop path rate: 0.6)."""
    return _create_transnext("transnext_base", pretrained, **dict(_BASE, **kwargs))


@register_model
def moh_vit_small_80(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-S with 80 % of the heads active, 49.9 M parameters (published drop path rate: 0.45)."""
    model_args = dict(_SMALL, shared_heads=(3, 6, 3, 8), routed_heads=(0, 0, 6, 12))
    return _create_transnext("moh_vit_small_80", pretrained, **dict(model_args, **kwargs))


@register_model
def moh_vit_small_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-S with 75 % of the heads active, 49.9 M parameters (published drop path rate: 0.45)."""
    model_args = dict(_SMALL, shared_heads=(3, 6, 3, 4), routed_heads=(0, 0, 6, 12))
    return _create_transnext("moh_vit_small_75", pretrained, **dict(model_args, **kwargs))


@register_model
def moh_vit_base_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-B with 75 % of the heads active, 90.0 M parameters (published drop path rate: 0.6)."""
    model_args = dict(_BASE, shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16))
    return _create_transnext("moh_vit_base_75", pretrained, **dict(model_args, **kwargs))


@register_model
def moh_vit_base_50(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-B with 50 % of the heads active, 90.0 M parameters (published drop path rate: 0.6)."""
    model_args = dict(_BASE, shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8))
    return _create_transnext("moh_vit_base_50", pretrained, **dict(model_args, **kwargs))


@register_model
def test_moh_vit(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """A small MoH-ViT for tests and demonstrations: 78 % of the heads active."""
    model_args = dict(
        img_size=96, embed_dims=(16, 32, 64, 96), depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 12),
        mlp_ratios=(4, 4, 3, 3), shared_heads=(2, 2, 3, 4), routed_heads=(0, 1, 3, 5),
    )  # fmt: skip
    return _create_transnext("test_moh_vit", pretrained, **{**model_args, **tag_size("test_moh_vit", kwargs), **kwargs})

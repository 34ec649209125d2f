"""NAT and DiNAT: hierarchical transformers of neighbourhood attention.

Papers: 'Neighborhood Attention Transformer' (CVPR 2023), https://arxiv.org/abs/2204.07143; 'Dilated Neighborhood
Attention Transformer', https://arxiv.org/abs/2209.15001. The authors' code is MIT; their weights load by the released
names, those of the dense backbones and of transformers' copies too. Each stage here begins with its downsampler, which
the released networks have at the end of the stage before.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerType,
    Mlp,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    trunc_normal_,
)
from torch import nn

from visionattn._timm import (
    checkpoint,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
)
from visionattn.layers.nat import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from visionattn.layers.neighborhood import NeighborhoodAttention

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._head import PooledClassifier
from ._shipped import digits_cfgs

__all__ = ["NAT"]


class NATBlock(nn.Module):
    """Pre-norm neighbourhood attention and MLP on maps (B, H, W, C), each residual and optionally scaled.

    Args:
        layer_scale: initial value of the per-channel factors ``gamma1, gamma2`` of the branches; None or 0 for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.layer_scale = layer_scale or None
        self.norm1 = norm_layer(dim, **dd)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, dims=2, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop,
            proj_drop=proj_drop, **dd,
        )  # fmt: skip
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if self.layer_scale is None:
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)
        else:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.attn(self.norm1(x))
        if self.gamma1 is not None:
            branch = self.gamma1 * branch
        x = x + self.drop_path(branch)
        branch = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            branch = self.gamma2 * branch
        return x + self.drop_path(branch)


class NATLevel(nn.Module):
    """Downsampler, blocks; maps (B, H, W, C) in and out. ``out_norm`` belongs to the output as a feature."""

    def __init__(self, downsample: nn.Module, blocks: list[NATBlock], out_norm: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.out_norm = out_norm
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class NAT(PooledClassifier):
    """NAT or DiNAT image classifier; any input size.

    Args:
        embed_dim: width of the first stage; it doubles with every other.
        depths, num_heads: blocks and heads of the stages.
        kernel_size: window of the attention, odd in the papers.
        dilations: of each block, a sequence for each stage; None is 1 everywhere. Constants, whatever the map's size:
            a map below kernel_size * dilation is zero-padded.
        mlp_ratio: width of the MLPs over the block's.
        layer_scale: initial value of the factors of the residual branches; None or 0 for none (timm drops arguments
            that are None).
        swin_layout: Swin's patch embedding and merging instead of overlapping convolutions (the ``dinat_s`` models).
        out_norm: features go through a norm of their own stage, as in the released backbones of detection and
            segmentation. A file of such a backbone switches it on.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, after the tokenizer,
            in the blocks, of attention weights.

    Raises:
        ValueError: for stages of different numbers, or heads that do not fit.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 6, 5),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: tuple[tuple[int, ...], ...] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        swin_layout: bool = False,
        out_norm: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.GELU,
        norm_layer: LayerType = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        dilations = tuple((1,) * depth for depth in depths) if dilations is None else dilations
        _check_arguments(embed_dim, depths, num_heads, kernel_size, dilations)
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.out_norm = out_norm

        tokenizer, downsampler = (PatchTokenizer, PatchMerging) if swin_layout else (ConvTokenizer, ConvDownsampler)
        self.patch_embed = tokenizer(in_chans, embed_dim, norm_layer, dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info = []
        self.levels = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim, last = embed_dim * 2**i, i == len(depths) - 1
            blocks = [
                NATBlock(
                    dim, num_heads[i], kernel_size, dilations[i][j], mlp_ratio, layer_scale, qkv_bias, qk_scale,
                    proj_drop_rate, attn_drop_rate, dpr[i][j], act_layer, norm_layer, **dd,
                )
                for j in range(depth)
            ]  # fmt: skip
            downsample = downsampler(dim // 2, dim, norm_layer, dd) if i > 0 else nn.Identity()
            # the last stage's norm is the network's
            own_norm = norm_layer(dim, **dd) if out_norm and not last else nn.Identity()
            self.levels.append(NATLevel(downsample, blocks, own_norm))
            self.feature_info.append(dict(num_chs=dim, reduction=2 ** (i + 2), module=f"levels.{i}"))

        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.norm = norm_layer(self.num_features, **dd)
        self._make_classifier(num_classes, global_pool, dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """The published initialisation of every parameter; convolutions have PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NeighborhoodAttention):
                module.reset_parameters()
            elif isinstance(module, NATBlock) and module.layer_scale is not None:
                nn.init.constant_(module.gamma1, module.layer_scale)
                nn.init.constant_(module.gamma2, module.layer_scale)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beside vectors: the released recipe decays the bias tables (its dense configurations do not)."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            blocks = [(r"^levels\.(\d+)", None), (r"^norm", (99999,))]
        else:
            blocks = [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^levels\.(\d+)\.out_norm", (99998,)),
                (r"^norm", (99999,)),
            ]
        return dict(stem=r"^patch_embed", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def set_out_norm(self) -> None:
        """Gives the features norms of their stages, as with ``out_norm=True``, in the model's device and dtype."""
        if self.out_norm:
            return
        self.out_norm = True
        dd = get_device_dtype(self)
        for level, info in zip(self.levels[:-1], self.feature_info, strict=False):
            level.out_norm = type(self.norm)(info["num_chs"], **dd).train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Final features and the outputs of the chosen stages, timm's contract.

        Each output is what the stage's last block gives; with ``out_norm`` it goes through the stage's norm. ``norm``
        asks for the last stage's, which is the network's.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW, NHWC."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        x = self.pos_drop(self.patch_embed(x))
        last = len(self.levels) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice a ModuleList
            levels = self.levels
        else:
            levels = self.levels[: max_index + 1]
        feat_idx = 0
        for feat_idx, level in enumerate(levels):
            x = level(x)
            if feat_idx in take_indices:
                y = level.out_norm(x)
                if feat_idx == last and (norm or self.out_norm):
                    y = self.norm(y)
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        if feat_idx == last:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the chosen stages do not need; returns their indices. Norms of features stay."""
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        cut = max_index < len(self.levels) - 1
        self._keep_stages("levels", max_index + 1, classifier=not (cut or prune_head))
        for i, level in enumerate(self.levels):
            if i not in take_indices:
                level.out_norm = nn.Identity()
        if self.out_norm and cut:  # the last stage's norm is in the place of the network's
            self.norm, self.levels[-1].out_norm = self.levels[-1].out_norm, nn.Identity()
        elif cut or (prune_norm and not self.out_norm):
            self.norm = nn.Identity()
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos_drop(self.patch_embed(x))
        for level in self.levels:
            x = level(x)
        return self.norm(x).permute(0, 3, 1, 2)


def _check_arguments(embed_dim, depths, num_heads, kernel_size, dilations) -> None:
    for name, values in (("num_heads", num_heads), ("dilations", dilations)):
        if not isinstance(values, tuple | list) or len(values) != len(depths):
            raise ValueError(f"NAT: {name}={values} and depths={depths} differ in length: give one a stage")
    for i, (depth, steps) in enumerate(zip(depths, dilations, strict=True)):
        if len(steps) != depth or min(steps, default=1) < 1:
            raise ValueError(f"NAT: dilations[{i}]={tuple(steps)}: give one from 1 on for each of {depth} blocks")
    for i, heads in enumerate(num_heads):
        if heads < 1 or embed_dim * 2**i % heads:
            raise ValueError(f"NAT: num_heads={heads} does not divide stage width {embed_dim * 2**i}: use a divisor")
    if kernel_size < 1:
        raise ValueError(f"NAT: kernel_size={kernel_size}: use at least 1")


# transformers' names (after its prefix), and the released ones
_TRANSFORMERS_NAMES = [
    (r"^(nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^hidden_states_norms\.stage1\.", "norm0."),  # its backbone's
    (r"^hidden_states_norms\.stage2\.", "norm1."),
    (r"^hidden_states_norms\.stage3\.", "norm2."),
    (r"^hidden_states_norms\.stage4\.", "norm3."),
    (r"^classifier\.", "head."),
]


def _from_transformers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The released names, with queries, keys and values in one projection."""
    translated = {}
    for name, value in state_dict.items():
        for theirs, released in _TRANSFORMERS_NAMES:
            name = re.sub(theirs, released, name)
        if name.endswith(".layer_scale_parameters"):
            block = name.removesuffix("layer_scale_parameters")
            translated[f"{block}gamma1"], translated[f"{block}gamma2"] = value[0], value[1]
        else:
            translated[name] = value
    for name in [name for name in translated if ".attn.query." in name]:
        parts = [translated.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        translated[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return translated


def _with_out_norms(state_dict: dict[str, torch.Tensor], model: NAT) -> dict[str, torch.Tensor]:
    """The norms of a released dense backbone (``norm0`` to ``norm3``) under this model's names."""
    norms = [f"norm{i}" for i in range(len(model.levels))]
    if any(f"{norm}.weight" in state_dict for norm in norms):
        model.set_out_norm()
        ours = [f"levels.{i}.out_norm" for i in range(len(norms) - 1)] + ["norm"]
        for theirs, own in zip(norms, ours, strict=True):
            for part in ("weight", "bias"):
                if f"{theirs}.{part}" in state_dict:
                    state_dict[f"{own}.{part}"] = state_dict.pop(f"{theirs}.{part}")
    elif model.out_norm:  # a classifier's file: the norms that it lacks stay as they are initialised
        for name, value in model.state_dict().items():
            if ".out_norm." in name:
                state_dict.setdefault(name, value)
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: NAT) -> dict[str, torch.Tensor]:
    """Opens wrappers and translates names: released classifiers and dense backbones, transformers' copies.

    Bias tables of another kernel size are interpolated (bicubic).
    """
    state_dict = unwrap_state_dict(state_dict)
    if any("encoder.levels." in name for name in state_dict):
        state_dict = _from_transformers(state_dict)
    at_end = any(re.match(r"(levels|layers)\.0\.downsample\.", name) for name in state_dict)
    own, translated = model.state_dict(), {}
    for name, value in state_dict.items():
        name = re.sub(r"^layers\.", "levels.", name)
        if at_end and (found := re.match(r"levels\.(\d+)\.(downsample\..*)", name)):
            name = f"levels.{int(found[1]) + 1}.{found[2]}"
        if name.endswith(".rpb") and name in own and value.shape != own[name].shape and value.ndim == 3:
            value = F.interpolate(value[None].float(), own[name].shape[1:], mode="bicubic", align_corners=False)[0]
        translated[name] = value
    return _with_out_norms(translated, model)


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
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2204.07143",
        "paper_name": "Neighborhood Attention Transformer",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    }


_DINAT = dict(paper_ids="arXiv:2209.15001", paper_name="Dilated Neighborhood Attention Transformer")
_DINAT_S = dict(_DINAT, first_conv="patch_embed.proj")
_NAT_URL = "https://shi-labs.com/projects/nat/checkpoints/CLS"
_DINAT_URL = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k"

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(f"{_NAT_URL}/nat_mini.pth"),
        "nat_tiny.in1k": _cfg(f"{_NAT_URL}/nat_tiny.pth"),
        "nat_small.in1k": _cfg(f"{_NAT_URL}/nat_small.pth"),
        "nat_base.in1k": _cfg(f"{_NAT_URL}/nat_base.pth"),
        "dinat_mini.in1k": _cfg(f"{_DINAT_URL}/dinat_mini_in1k_224.pth", **_DINAT),
        "dinat_tiny.in1k": _cfg(f"{_DINAT_URL}/dinat_tiny_in1k_224.pth", **_DINAT),
        "dinat_small.in1k": _cfg(f"{_DINAT_URL}/dinat_small_in1k_224.pth", **_DINAT),
        "dinat_base.in1k": _cfg(f"{_DINAT_URL}/dinat_base_in1k_224.pth", **_DINAT),
        "dinat_s_tiny.in1k": _cfg(f"{_DINAT_URL}/dinat_s_tiny_in1k_224.pth", **_DINAT_S),
        "dinat_s_small.in1k": _cfg(f"{_DINAT_URL}/dinat_s_small_in1k_224.pth", **_DINAT_S),
        "dinat_s_base.in1k": _cfg(f"{_DINAT_URL}/dinat_s_base_in1k_224.pth", **_DINAT_S),
        **digits_cfgs("test_nat", _cfg(input_size=(3, 96, 96), pool_size=(3, 3)), 64),
    }
)


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _alternating(depths: tuple[int, ...], odd: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Dilation 1 in the even blocks of a stage, the stage's of ``odd`` in the others (DiNAT, table 1)."""
    return tuple(tuple(step if j % 2 else 1 for j in range(depth)) for depth, step in zip(depths, odd, strict=True))


_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0)
_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0)
_ODD = (8, 4, 2, 1)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 20.0 M parameters (published drop path rate: 0.2)."""
    return _create_nat("nat_mini", pretrained, **dict(_MINI, **kwargs))


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 27.9 M parameters (published drop path rate: 0.2)."""
    return _create_nat("nat_tiny", pretrained, **dict(_TINY, **kwargs))


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 50.7 M parameters, with layer scale (published drop path rate: 0.3)."""
    model_args = dict(_SMALL, layer_scale=1e-5)
    return _create_nat("nat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 89.8 M parameters, with layer scale (published drop path rate: 0.5)."""
    model_args = dict(_BASE, layer_scale=1e-5)
    return _create_nat("nat_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, 20.0 M parameters (published drop path rate: 0.2)."""
    model_args = dict(_MINI, dilations=_alternating(_MINI["depths"], _ODD))
    return _create_nat("dinat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, 27.9 M parameters (published drop path rate: 0.2)."""
    model_args = dict(_TINY, dilations=_alternating(_TINY["depths"], _ODD))
    return _create_nat("dinat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, 50.7 M parameters, without layer scale (published drop path rate: 0.3)."""
    model_args = dict(_SMALL, dilations=_alternating(_SMALL["depths"], _ODD))
    return _create_nat("dinat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, 89.8 M parameters, with layer scale (published drop path rate: 0.5)."""
    model_args = dict(_BASE, layer_scale=1e-5, dilations=_alternating(_BASE["depths"], _ODD))
    return _create_nat("dinat_base", pretrained, **dict(model_args, **kwargs))


def _swin_like(embed_dim: int, depths: tuple[int, ...], heads: int) -> dict[str, Any]:
    num_heads = (heads, 2 * heads, 4 * heads, 8 * heads)
    dilations = _alternating(depths, _ODD)
    return dict(
        embed_dim=embed_dim, depths=depths, num_heads=num_heads, dilations=dilations, mlp_ratio=4.0, swin_layout=True
    )


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Tiny, Swin's layout, 28.3 M parameters (published drop path rate: 0.2)."""
    return _create_nat("dinat_s_tiny", pretrained, **dict(_swin_like(96, (2, 2, 6, 2), 3), **kwargs))


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Small, Swin's layout, 49.6 M parameters (published drop path rate: 0.3)."""
    return _create_nat("dinat_s_small", pretrained, **dict(_swin_like(96, (2, 2, 18, 2), 3), **kwargs))


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Base, Swin's layout, 87.8 M parameters (published drop path rate: 0.5)."""
    return _create_nat("dinat_s_base", pretrained, **dict(_swin_like(128, (2, 2, 18, 2), 4), **kwargs))


@register_model
def test_nat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """A small DiNAT with layer scale for tests and demonstrations."""
    model_args = dict(
        embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3, mlp_ratio=2.0,
        layer_scale=1e-5, dilations=((1,), (1, 2), (1, 2), (1,)),
    )  # fmt: skip
    return _create_nat("test_nat", pretrained, **dict(model_args, **kwargs))

"""MAViT: a convolutional pyramid whose first stages mix by magnitude-aware linear attention (MALA).

Paper: 'Rectifying Magnitude Neglect in Linear Attention' (ICCV 2025), https://arxiv.org/abs/2507.00698. The
released code carries no licence; the networks are written from a description of it, under its parameter names.

Blocks work on (B, H, W, C) in memory, where 1 x 1 convolutions are matrix products and the norm needs no permute; what
modules exchange are maps (B, C, H, W) in channels-last strides.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    fast_layer_norm,
    register_notrace_module,
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
from visionattn.layers.cast import Conv2d, KeepsCast, PreNorm
from visionattn.layers.mala import MALA, PointwiseConv, RotaryEmbedding
from visionattn.ops.depthwise import depthwise_residual

from ._checkpoint import CheckpointError, build_model_with_cfg, unwrap_state_dict
from ._head import PooledClassifier
from ._shipped import digits_cfgs

__all__ = ["MAViT"]


@register_notrace_module  # asks for autocast, which a tracer can't
class ChannelNorm(nn.Module):
    """Layer norm over the last axis; under autocast in its low precision (with statistics in float32), as timm's."""

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.norm = PreNorm(dim, eps=eps, device=device, dtype=dtype)
        self.dim = dim

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:  # which knows no autocast
            return F.layer_norm(x, [self.dim], self.norm.weight, self.norm.bias, self.norm.eps)
        return fast_layer_norm(x, [self.dim], self.norm.weight, self.norm.bias, self.norm.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            fused = self.norm.fused(x, None)
            if fused is not None:
                return fused[1]
        return self._plain(x)


@register_notrace_module
class ChannelResidualNorm(ChannelNorm):
    """``(x + y, layer norm of it)``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            fused = self.norm.fused(x, y)
            if fused is not None:
                return fused
        x = x + y
        return x, self._plain(x)


@register_notrace_module
class DepthwiseConv(KeepsCast, nn.Conv2d):
    """A depthwise 3 x 3 convolution of (B, H, W, C), with a convolution's parameters, plus its input."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        weight, bias = self.weight, self.bias
        if not torch.jit.is_scripting():
            weight, bias = self.cast()
        tokens = x.reshape(B, H * W, C)
        return depthwise_residual(tokens, tokens, weight.reshape(1, C, 9), bias, (H, W)).reshape(B, H, W, C)


class ConvFFN(nn.Module):
    """1 x 1, GELU, a depthwise 3 x 3 with its own shortcut, 1 x 1; of (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim, **dd)
        self.fc2 = PointwiseConv(hidden_dim, dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)

    def forward(self, x: torch.Tensor, layer_scale: torch.Tensor | None = None) -> torch.Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(self.dwconv(x), layer_scale)


class Block(nn.Module):
    """Depthwise position convolution, attention, feed-forward, each residual; of (B, H, W, C) and the grid's tables."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.5,
        attn_type: str = "linear",
        layer_scale_init: float | None = 1.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.pos = DepthwiseConv(dim, **dd)
        self.norm1 = ChannelNorm(dim, **dd)
        self.attn = MALA(dim, num_heads, attn_type, backend=backend, own_tables=False, **dd)
        self.norm2 = ChannelResidualNorm(dim, **dd)
        self.ffn = ConvFFN(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.gamma_1 = self.gamma_2 = None
        if layer_scale_init is not None:
            self.gamma_1 = nn.Parameter(torch.empty(1, dim, 1, 1, **dd))
            self.gamma_2 = nn.Parameter(torch.empty(1, dim, 1, 1, **dd))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma_1 is not None and self.gamma_2 is not None:
            nn.init.constant_(self.gamma_1, self.layer_scale_init)
            nn.init.constant_(self.gamma_2, self.layer_scale_init)

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        H, W = x.shape[1], x.shape[2]
        x = self.pos(x)
        y = self.norm1(x).flatten(1, 2)
        y = self.attn(y, (H, W), tables=tables, layer_scale=self.gamma_1)
        x, y = self.norm2(x, self.drop_path(y.reshape(x.shape)))
        return x + self.drop_path(self.ffn(y, self.gamma_2))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2, batch norm."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x))


class Stem(nn.Module):
    """Four 3 x 3 convolutions with batch norm, of stride 2, 1, 1, 2."""

    def __init__(self, in_chans: int = 3, embed_dim: int = 64, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        half = embed_dim // 2
        layers: list[nn.Module] = []
        for i, (chs, out_chs, stride) in enumerate(
            [(in_chans, half, 2), (half, half, 1), (half, half, 1), (half, embed_dim, 2)]
        ):
            layers += [Conv2d(chs, out_chs, 3, stride=stride, padding=1, **dd), nn.BatchNorm2d(out_chs, **dd)]
            if i < 3:
                layers.append(nn.GELU())
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """Blocks of one resolution, maps (B, C, H, W) in and out; ``downsample`` follows after the features are taken."""

    def __init__(self, blocks: list[Block], head_dim: int, downsample: nn.Module, device=None):
        super().__init__()
        self.RoPE = RotaryEmbedding(head_dim, device=device)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()  # free in channels-last strides
        tables = self.RoPE((x.shape[1], x.shape[2]), 0, x.dtype)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, tables)
            else:
                x = block(x, tables)
        return x.permute(0, 3, 1, 2)


class MAViT(PooledClassifier):
    """MAViT image classifier; any input size.

    Args:
        img_size: size (pixels) that the model is for; recorded only, the weights are of no size.
        embed_dims, depths, num_heads, mlp_ratios: of the stages.
        attn_type: ``'linear'`` or ``'softmax'``, for all stages or one for each.
        layer_scale_inits: initial layer scale of the stages, None for none.
        projection: width of the 1 x 1 convolution before pooling.
        out_norm: layer norms over the outputs of the stages in ``forward_intermediates`` and ``features_only``, as
            dense prediction has them (``extra_norms``); they stay as initialised where a file does not hold them.
        attn_backend: of the linear attention, see :func:`visionattn.ops.linear.mala_mix`.

    Raises:
        ValueError: for stages of different numbers, heads that do not fit, an unknown ``attn_type``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mlp_ratios: tuple[float, ...] = (3.5, 3.5, 3.5, 3.5),
        attn_type: str | tuple[str, ...] = ("linear", "linear", "softmax", "softmax"),
        layer_scale_inits: tuple[float | None, ...] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 2048,
        out_norm: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        attn_type = (attn_type,) * len(depths) if isinstance(attn_type, str) else tuple(attn_type)
        per_stage = dict(
            embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, attn_type=attn_type,
            layer_scale_inits=layer_scale_inits,
        )  # fmt: skip
        for name, values in per_stage.items():
            if len(values) != len(depths):
                raise ValueError(f"MAViT: {name}={values} and depths={depths} differ in length: give one a stage")
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        self.drop_rate = drop_rate

        self.patch_embed = Stem(in_chans, embed_dims[0], **dd)
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info = []
        self.layers = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            blocks = [
                Block(
                    dim, num_heads[i], mlp_ratios[i], attn_type[i], layer_scale_inits[i], dpr[i][j], attn_backend, **dd
                )
                for j in range(depths[i])
            ]  # fmt: skip
            last = i == len(depths) - 1
            downsample = nn.Identity() if last else Downsample(dim, embed_dims[i + 1], **dd)
            self.layers.append(Stage(blocks, dim // num_heads[i], downsample, device))
            self.feature_info.append(dict(num_chs=dim, reduction=2 ** (i + 2), module=f"layers.{i}"))
        self.out_norm = out_norm
        norms = [ChannelNorm(dim, **dd) if out_norm else nn.Identity() for dim in embed_dims]
        self.extra_norms = nn.ModuleList(norms)

        self.proj: nn.Module = PointwiseConv(embed_dims[-1], projection, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(projection, **dd)
        self.act: nn.Module = nn.SiLU()
        self.num_features = projection
        self._make_classifier(num_classes, global_pool, dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """The published initialisation of every parameter; the tables are computed again."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, Block, RotaryEmbedding)):
                module.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = [(r"^(?:proj|norm|extra_norms)\b", (99999,))]
        if coarse:
            return dict(stem=r"^patch_embed", blocks=[(r"^layers\.(\d+)", None), *last])
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (0,))]
        return dict(stem=r"^patch_embed", blocks=[*blocks, *last])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Records another input size; every size goes anyway."""
        if img_size is None or to_2tuple(img_size) == self.img_size:
            return
        update_model_input_size(self, to_2tuple(img_size))  # refuses sizes first
        self.img_size = to_2tuple(img_size)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.act(self.norm(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Final features and the outputs of the chosen stages, timm's contract; ``norm`` is ``out_norm``'s business."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        x = self._embed(x)
        for i, (stage, out_norm) in enumerate(zip(self.layers, self.extra_norms, strict=True)):
            if torch.jit.is_scripting() or not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    y = out_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.out_norm else x
                    intermediates.append(y)
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return self._project(x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the chosen stages do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        # the projection never feeds an intermediate, so it goes with the head, the norm or a truncation
        prune_end = prune_norm or prune_head or max_index < len(self.layers) - 1
        self._keep_stages("layers", max_index + 1, classifier=not prune_end)
        norms = [norm if i in take_indices else nn.Identity() for i, norm in enumerate(self.extra_norms)]
        self.extra_norms = nn.ModuleList(norms[: max_index + 1])
        if prune_end:
            self.layers[-1].downsample = nn.Identity()
            self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self._embed(x)
        for stage in self.layers:
            x = stage.downsample(stage(x))
        return self._project(x)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers and fits the authors' names: the classifier is a 1 x 1 convolution there, angles are saved.

    What only one of classification and dense prediction has is taken from the model where the file lacks all of it.
    A file with norms of the outputs is refused by a model without them.
    """
    translated = {}
    for name, value in unwrap_state_dict(state_dict).items():
        if name.endswith("RoPE.angle"):
            continue
        translated[name] = value.flatten(1) if name == "head.weight" else value
    own = model.state_dict()
    dense = any(name.startswith("extra_norms.") for name in translated)
    if dense and not model.out_norm:
        raise CheckpointError(
            "is of a backbone for dense prediction, with norms of its outputs (extra_norms): build the model with "
            "features_only=True, out_norm=True"
        )
    kept = ("proj.", "norm.") if dense else ("extra_norms.",)
    if model.out_norm and not any(name.startswith(kept) for name in translated):
        translated |= {name: value for name, value in own.items() if name.startswith(kept)}
    return translated


_URL = "https://huggingface.co/aldjalkdf/MAViT/resolve/main"


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # short side 256 for 224 px; the paper crops nothing off larger inputs
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "unknown",
        "paper_ids": "arXiv:2507.00698",
        "paper_name": "Rectifying Magnitude Neglect in Linear Attention",
        "origin_url": "https://github.com/qhfan/MALA",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "mala_tiny.untrained": _cfg(),
        "mala_small.in1k": _cfg(f"{_URL}/MAViT_S.pth"),
        "mala_base.in1k": _cfg(f"{_URL}/MAViT_B.pth"),
        "mala_large.in1k": _cfg(f"{_URL}/MAViT_L.pth"),
        **digits_cfgs("test_mala", _cfg(input_size=(3, 96, 96), pool_size=(3, 3)), 32),
    }
)


def _create_mala(variant: str, pretrained: bool = False, **kwargs: Any) -> MAViT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        MAViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def mala_tiny(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-T, 16.4 M parameters (published drop path rate: 0.1)."""
    model_args = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    return _create_mala("mala_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def mala_small(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-S, 27.1 M parameters (published drop path rate: 0.15)."""
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8))
    return _create_mala("mala_small", pretrained, **dict(model_args, **kwargs))


@register_model
def mala_base(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-B, 49.8 M parameters (published drop path rate: 0.4)."""
    model_args = dict(
        embed_dims=(96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8),
        layer_scale_inits=(1.0, 1.0, 1e-6, 1e-6),
    )  # fmt: skip
    return _create_mala("mala_base", pretrained, **dict(model_args, **kwargs))


@register_model
def mala_large(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-L, 97.8 M parameters (published drop path rate: 0.55)."""
    model_args = dict(
        embed_dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(1, 2, 7, 10), projection=2560,
        layer_scale_inits=(1e-6, 1e-6, 1e-6, 1e-6),
    )  # fmt: skip
    return _create_mala("mala_large", pretrained, **dict(model_args, **kwargs))


@register_model
def test_mala(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """A small MAViT for tests and demonstrations."""
    model_args = dict(
        embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), projection=256,
    )  # fmt: skip
    return _create_mala("test_mala", pretrained, **dict(model_args, **kwargs))

"""HaloNet: a ResNet whose 3x3 convolutions are halo attention.

Paper: 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones' (CVPR 2021),
https://arxiv.org/abs/2103.12731. The authors released neither code nor weights.

The networks follow the paper's family table. What it leaves open (heads, tables, scaffolding) is read so that all eight
published parameter counts come out to the printed digit: widths 64, 128, 256, 512; query and key heads of 16 channels;
values rv times and block outputs rb times the width; no output projection; batch norm after every projection and after
the attention; strided queries in the first block of stages 2 to 4. It is a reading, not the authors' code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from torch import nn

from visionattn._timm import (
    checkpoint_seq,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
)
from visionattn.layers.halo import HaloAttention

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._shipped import digits_cfgs

__all__ = ["HaloNet"]


class HaloBlock(nn.Module):
    """1x1, halo attention (or a 3x3 convolution), 1x1, each with batch norm, and a shortcut."""

    def __init__(
        self,
        in_chs: int,
        width: int,
        out_chs: int,
        stride: int = 1,
        rv: float = 1.0,
        head_dim: int = 16,
        block_size: int = 8,
        halo_size: int = 3,
        border: str = "zero",
        conv: bool = False,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.SiLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        width_v = int(width * rv)
        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, **dd)
        self.bn1 = norm_layer(width, **dd)
        self.act1 = act_layer()
        if conv:
            self.attn = nn.Conv2d(width, width_v, 3, stride=stride, padding=1, bias=False, **dd)
        else:
            self.attn = HaloAttention(
                width,
                width_v,
                stride=stride,
                num_heads=width // head_dim,
                dim_head=head_dim,
                block_size=block_size,
                halo_size=halo_size,
                border=border,
                **dd,
            )
        self.bn2 = norm_layer(width_v, **dd)
        self.act2 = act_layer()
        self.conv3 = nn.Conv2d(width_v, out_chs, 1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.down = nn.Identity()
        if stride > 1 or in_chs != out_chs:
            self.down = nn.Sequential(
                nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd), norm_layer(out_chs, **dd)
            )
        self.act3 = act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.down(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.attn(x)))
        x = self.bn3(self.conv3(x))
        return self.act3(self.drop_path(x) + shortcut)


class HaloNet(nn.Module):
    """HaloNet image classifier; any input size, maps that blocks do not tile are padded.

    Args:
        block_size, halo_size: b and h of the attention. Where the block is odd, the strided layers pool their output
            (2 x 2 averages) instead of striding their queries, as timm's networks with odd blocks do.
        rv, rb: width of the values and of the block outputs over the stage's width.
        depths: blocks of the stages.
        widths: widths of the stages; the first is the stem's too.
        head_dim: channels of a query and key head.
        final_dim: width of the 1x1 convolution before pooling, none where 0 or None.
        conv_stages: stages (1 to 4) whose blocks have 3x3 convolutions in place of attention (paper, table 6).
        border: see :class:`visionattn.layers.HaloAttention`.

    Raises:
        ValueError: for heads that do not divide a width, stages that do not exist or have no block.
    """

    def __init__(
        self,
        block_size: int = 8,
        halo_size: int = 3,
        rv: float = 1.0,
        rb: float = 1.0,
        depths: tuple[int, ...] = (3, 3, 10, 3),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        head_dim: int = 16,
        final_dim: int | None = None,
        conv_stages: tuple[int, ...] = (),
        border: str = "zero",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = "silu",
        norm_layer: LayerType = "batchnorm2d",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        _check_arguments(depths, widths, head_dim, rv, rb, conv_stages)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        act_layer = get_act_layer(act_layer)
        norm_layer = get_norm_layer(norm_layer)

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 7, stride=2, padding=3, bias=False, **dd),
            norm_layer(widths[0], **dd),
            act_layer(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info = []
        stages = []
        chs = widths[0]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(
                    HaloBlock(
                        chs,
                        width,
                        int(width * rb),
                        stride=2 if i > 0 and j == 0 else 1,
                        rv=rv,
                        head_dim=head_dim,
                        block_size=block_size,
                        halo_size=halo_size,
                        border=border,
                        conv=i + 1 in conv_stages,
                        drop_path=dpr[i][j],
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        **dd,
                    )
                )
                chs = int(width * rb)
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=2 ** (i + 2), module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)

        self.num_features = final_dim or chs
        self.final = nn.Identity()
        if final_dim:
            self.final = nn.Sequential(
                nn.Conv2d(chs, final_dim, 1, bias=False, **dd), norm_layer(final_dim, **dd), act_layer()
            )
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, HaloAttention):
                module.reset_parameters()
            elif isinstance(module, HaloBlock):
                for conv in (module.conv1, module.conv3):
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bn3.weight)  # a block begins as its shortcut

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return dict(stem=r"^stem", blocks=[(blocks, None), (r"^final", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Final features and the outputs of the chosen stages, timm's contract; ``norm`` has nothing to apply here."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice a ModuleList
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if feat_idx == len(self.stages) - 1:
            x = self.final(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the chosen stages do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        # the final 1x1 never feeds an intermediate, so it goes with the head, the norm or a truncation
        prune_end = prune_norm or prune_head or max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.final = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _check_arguments(depths, widths, head_dim, rv, rb, conv_stages) -> None:
    if len(depths) != len(widths):
        raise ValueError(f"HaloNet: depths={depths} and widths={widths} differ in length: give one of each a stage")
    if min(depths) < 1 or head_dim < 1 or min(int(w * r) for w in widths for r in (1, rv, rb)) < 1:
        raise ValueError(
            f"HaloNet: depths={depths}, widths={widths}, head_dim={head_dim}, rv={rv}, rb={rb}: each stage "
            "needs a block, each head, value and output a channel"
        )
    if isinstance(conv_stages, int):
        raise ValueError(f"HaloNet: conv_stages={conv_stages} is one number: give a tuple of stages, ({conv_stages},)")
    strange = [s for s in conv_stages if s not in range(1, len(widths) + 1)]
    if strange:
        raise ValueError(f"HaloNet: conv_stages={tuple(conv_stages)}: stages are numbered 1 to {len(widths)}")
    for i, width in enumerate(widths):
        if i + 1 not in conv_stages and (width % head_dim or int(width * rv) % (width // head_dim)):
            raise ValueError(
                f"HaloNet: head_dim={head_dim}, rv={rv} do not divide stage width {width} into whole heads: "
                "choose a head_dim that divides it"
            )


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers; there are no official names to translate."""
    return unwrap_state_dict(state_dict)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2103.12731",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "origin_url": "https://arxiv.org/abs/2103.12731",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "halo_h0.untrained": _cfg(),
        "halo_h1.untrained": _cfg(),
        "halo_h2.untrained": _cfg(),
        "halo_h3.untrained": _cfg(input_size=(3, 320, 320), pool_size=(10, 10)),
        "halo_h4.untrained": _cfg(input_size=(3, 384, 384), pool_size=(12, 12)),
        "halo_h5.untrained": _cfg(input_size=(3, 448, 448), pool_size=(14, 14)),
        "halo_h6.untrained": _cfg(input_size=(3, 512, 512), pool_size=(16, 16)),
        "halo_h7.untrained": _cfg(input_size=(3, 600, 600), pool_size=(19, 19)),
        **digits_cfgs("test_halo", _cfg(input_size=(3, 96, 96), pool_size=(3, 3)), 32),
    }
)


def _create_halonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return build_model_with_cfg(
        HaloNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def halo_h0(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H0, 256 px, 5.5 M parameters."""
    model_args = dict(block_size=8, halo_size=3, rv=1.0, rb=0.5, depths=(3, 3, 7, 3))
    return _create_halonet("halo_h0", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h1(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H1, 256 px, 8.1 M parameters."""
    model_args = dict(block_size=8, halo_size=3, rv=1.0, rb=1.0, depths=(3, 3, 10, 3))
    return _create_halonet("halo_h1", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h2(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H2, 256 px, 9.4 M parameters."""
    model_args = dict(block_size=8, halo_size=3, rv=1.0, rb=1.25, depths=(3, 3, 11, 3))
    return _create_halonet("halo_h2", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h3(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H3, 320 px, 11.8 M parameters."""
    model_args = dict(block_size=10, halo_size=3, rv=1.0, rb=1.5, depths=(3, 3, 12, 3), final_dim=1024)
    return _create_halonet("halo_h3", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h4(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H4, 384 px, 19.1 M parameters."""
    model_args = dict(block_size=12, halo_size=2, rv=1.0, rb=3.0, depths=(3, 3, 12, 3), final_dim=1280)
    return _create_halonet("halo_h4", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h5(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H5, 448 px, 30.7 M parameters."""
    model_args = dict(block_size=14, halo_size=2, rv=2.5, rb=2.0, depths=(3, 3, 23, 3), final_dim=1536)
    return _create_halonet("halo_h5", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h6(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H6, 512 px, 43.4 M parameters."""
    model_args = dict(block_size=8, halo_size=4, rv=3.0, rb=2.75, depths=(3, 3, 24, 3), final_dim=1536)
    return _create_halonet("halo_h6", pretrained, **dict(model_args, **kwargs))


@register_model
def halo_h7(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H7, 600 px (75 px maps are padded to whole blocks), 67.4 M parameters."""
    model_args = dict(block_size=10, halo_size=3, rv=4.0, rb=3.5, depths=(3, 3, 26, 3), final_dim=2048)
    return _create_halonet("halo_h7", pretrained, **dict(model_args, **kwargs))


@register_model
def test_halo(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """A small HaloNet for tests and demonstrations."""
    model_args = dict(
        block_size=4, halo_size=1, rb=1.5, depths=(1, 1, 2, 1), widths=(32, 48, 64, 96), head_dim=16, final_dim=192
    )
    return _create_halonet("test_halo", pretrained, **dict(model_args, **kwargs))

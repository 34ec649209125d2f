"""ELA in detectors: the necks of YOLOX and YOLOF, and the layout of the published YOLOX-Nano.

Paper: 'ELA: Efficient Local Attention for Deep Convolutional Neural Networks' (2024), https://arxiv.org/abs/2403.01123.
Positions are those of the authors' code, https://github.com/Xuwei86/ELA_Code.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

try:
    from mmdet.models.detectors import YOLOX
    from mmdet.models.necks import YOLOXPAFPN, DilatedEncoder
except ModuleNotFoundError as error:
    if error.name != "mmdet":
        raise
    raise ImportError("visionattn.detection.ela needs mmdet: pip install 'visionattn[detection]'") from error

from visionattn.layers.ela import ELA
from visionattn.layers.residual import Residual

from .registry import MODELS

__all__ = ["ELAYOLOX", "ELAYOLOXPAFPN", "ELADilatedEncoder", "mmdet_names_of_yolof_encoder", "mmdet_names_of_yolox"]


@MODELS.register_module()
class ELAYOLOXPAFPN(YOLOXPAFPN):
    """mmdet's YOLOXPAFPN with ELA on its inputs and on every concatenation; one module per width, shared.

    ``dict(type='visionattn.ELAYOLOXPAFPN', in_channels=[64, 128, 256], out_channels=64, num_csp_blocks=1,
    use_depthwise=True)`` is YOLOX-Nano's. The modules are ``attentions.{width}``.

    Args:
        version: of :class:`visionattn.layers.ELA`; the published checkpoint has ``'t'``.
        residual: ``y = ELA(y) + y``; the published detector has ``y = ELA(y)``.
        **kwargs: of YOLOXPAFPN.

    Raises:
        ValueError: for a version whose norm groups do not divide a width.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *args: Any,
        version: str = "t",
        residual: bool = False,
        **kwargs: Any,
    ):
        super().__init__(in_channels, out_channels, *args, **kwargs)
        widths = sorted({*in_channels, *(2 * width for width in in_channels[:-1])})
        modules = {str(width): ELA(width, version) for width in widths}
        self.attentions = nn.ModuleDict({w: Residual(m) if residual else m for w, m in modules.items()})

    def _attend(self, *maps: torch.Tensor) -> torch.Tensor:
        x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        return self.attentions[str(x.shape[1])](x)

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Maps (B, C_i, H_i, W_i), fine to coarse, to maps of ``out_channels`` of the same sizes."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"ELAYOLOXPAFPN takes {len(self.in_channels)} maps, got {len(inputs)}: see in_channels")
        inputs = [self._attend(x) for x in inputs]
        coarse, laterals = inputs[-1], []
        for reduce, block, fine in zip(self.reduce_layers, self.top_down_blocks, inputs[-2::-1], strict=True):
            laterals.append(reduce(coarse))
            coarse = block(self._attend(self.upsample(laterals[-1]), fine))
        outs = [coarse]
        for downsample, block, lateral in zip(self.downsamples, self.bottom_up_blocks, laterals[::-1], strict=True):
            outs.append(block(self._attend(downsample(outs[-1]), lateral)))
        return tuple(conv(x) for conv, x in zip(self.out_convs, outs, strict=True))


@MODELS.register_module()
class ELAYOLOX(YOLOX):
    """mmdet's YOLOX, which also loads files in the layout of the published YOLOX-Nano with ELA, by name.

    Its neck is meant to be :class:`ELAYOLOXPAFPN`. See :func:`mmdet_names_of_yolox`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_rename_yolox)


@MODELS.register_module()
class ELADilatedEncoder(DilatedEncoder):
    """mmdet's DilatedEncoder (YOLOF's neck) with ELA: on C5, behind the projection, around residual blocks.

    Every use is additive, y = ELA(y) + y. A block's module acts on its input, which is also its shortcut, and on its
    output. Loads the authors' names too, see :func:`mmdet_names_of_yolof_encoder`.

    Args:
        version: of :class:`visionattn.layers.ELA`; the authors' encoder has ``'t'``.
        attended_blocks: how many of the first residual blocks have a module; 3 of 4 in the authors' code.
        **kwargs: of DilatedEncoder.
    """

    def __init__(self, *args: Any, version: str = "t", attended_blocks: int = 3, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("lateral_conv", "fpn_conv"):  # a batch norm follows: the authors' have no bias, mmdet's do
            getattr(self, name).register_parameter("bias", None)
        if not 0 <= attended_blocks <= self.num_residual_blocks:
            raise ValueError(
                f"attended_blocks={attended_blocks}: the encoder has {self.num_residual_blocks} residual blocks"
            )
        self.input_attention = Residual(ELA(self.in_channels, version))
        self.projected_attention = Residual(ELA(self.out_channels, version))
        self.block_attentions = nn.ModuleList(Residual(ELA(self.out_channels, version)) for _ in range(attended_blocks))
        self.register_load_state_dict_pre_hook(_rename_yolof)

    def forward(self, feature: Sequence[torch.Tensor]) -> tuple[torch.Tensor]:
        """The last of ``feature``, (B, C, H, W), to one map (B, ``out_channels``, H, W)."""
        x = self.input_attention(feature[-1])
        x = self.fpn_norm(self.fpn_conv(self.lateral_norm(self.lateral_conv(x))))
        x = self.projected_attention(x)
        for i, block in enumerate(self.dilated_encoder_blocks):
            if i < len(self.block_attentions):
                attention = self.block_attentions[i]
                x = attention(block(attention(x)))
            else:
                x = block(x)
        return (x,)


# the published YOLOX's parts; what stands behind the dot is renamed by _yolox_leaf
_YOLOX_PARTS = {
    "backbone.backbone.stem.": "backbone.stem.",
    "backbone.backbone.dark2.": "backbone.stage1.",
    "backbone.backbone.dark3.": "backbone.stage2.",
    "backbone.backbone.dark4.": "backbone.stage3.",
    "backbone.backbone.dark5.": "backbone.stage4.",
    "backbone.lateral_conv0.": "neck.reduce_layers.0.",
    "backbone.reduce_conv1.": "neck.reduce_layers.1.",
    "backbone.C3_p4.": "neck.top_down_blocks.0.",
    "backbone.C3_p3.": "neck.top_down_blocks.1.",
    "backbone.bu_conv2.": "neck.downsamples.0.",
    "backbone.bu_conv1.": "neck.downsamples.1.",
    "backbone.C3_n3.": "neck.bottom_up_blocks.0.",
    "backbone.C3_n4.": "neck.bottom_up_blocks.1.",
    "head.stems.": "neck.out_convs.",
    "head.cls_convs.": "bbox_head.multi_level_cls_convs.",
    "head.reg_convs.": "bbox_head.multi_level_reg_convs.",
    "head.cls_preds.": "bbox_head.multi_level_conv_cls.",
    "head.reg_preds.": "bbox_head.multi_level_conv_reg.",
    "head.obj_preds.": "bbox_head.multi_level_conv_obj.",
}
_CSP = re.compile(r"^(backbone\.stage\d\.(?:1|2)|neck\.(?:top_down|bottom_up)_blocks\.\d)\.(conv[123]|m)\.")
_CSP_LAYERS = {"conv1": "main_conv", "conv2": "short_conv", "conv3": "final_conv", "m": "blocks"}
_POOLING = "backbone.stage4.1."  # its layers are called conv1 and conv2 on both sides
_UNUSED = ("backbone.feat5.", "backbone.feat10.")  # built by the authors' class, never called


def mmdet_names_of_yolox(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the published YOLOX (with ELA or without) under mmdet's names; others stay as they are.

    The authors' head begins with 1 x 1 convolutions (``head.stems``), which mmdet counts as the neck's last. The two
    modules that their class builds and never calls are left out.
    """
    widths = {name: str(len(v)) for name, v in state_dict.items() if re.match(r"backbone\.feat\d+\.gn\.weight", name)}
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith(_UNUSED):
            continue
        if match := re.match(r"(backbone\.feat\d+)\.(.+)", name):
            name = f"neck.attentions.{widths[match[1] + '.gn.weight']}.{match[2]}"
        for theirs, ours in _YOLOX_PARTS.items():
            if name.startswith(theirs):
                name = _yolox_leaf(ours + name.removeprefix(theirs))
                break
        renamed[name] = value
    return renamed


def _yolox_leaf(name: str) -> str:
    match = _CSP.match(name)
    if match and not name.startswith(_POOLING):
        name = f"{match[1]}.{_CSP_LAYERS[match[2]]}.{name[match.end() :]}"
    return name.replace(".dconv.", ".depthwise_conv.").replace(".pconv.", ".pointwise_conv.")


def _rename_yolox(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not any(name.startswith(f"{prefix}backbone.backbone.") for name in state_dict):
        return
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    for name in own:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in mmdet_names_of_yolox(own).items()})


_YOLOF_PARTS = [
    (r"^projector\.0\.convs\.0\.", "lateral_conv."),
    (r"^projector\.0\.convs\.1\.", "lateral_norm."),
    (r"^projector\.1\.convs\.0\.", "fpn_conv."),
    (r"^projector\.1\.convs\.1\.", "fpn_norm."),
    (r"^encoders\.(\d+)\.feat\d+\.", r"block_attentions.\1.module."),
    (r"^encoders\.(\d+)\.branch\.0\.convs\.0\.", r"dilated_encoder_blocks.\1.conv1.conv."),
    (r"^encoders\.(\d+)\.branch\.0\.convs\.1\.", r"dilated_encoder_blocks.\1.conv1.bn."),
    (r"^encoders\.(\d+)\.branch\.1\.convs\.0\.", r"dilated_encoder_blocks.\1.conv2.conv."),
    (r"^encoders\.(\d+)\.branch\.1\.convs\.1\.", r"dilated_encoder_blocks.\1.conv2.bn."),
    (r"^encoders\.(\d+)\.branch\.2\.convs\.0\.", r"dilated_encoder_blocks.\1.conv3.conv."),
    (r"^encoders\.(\d+)\.branch\.2\.convs\.1\.", r"dilated_encoder_blocks.\1.conv3.bn."),
]


def mmdet_names_of_yolof_encoder(state_dict: Mapping[str, Any], in_channels: int = 2048) -> dict[str, Any]:
    """The authors' YOLOF encoder under :class:`ELADilatedEncoder`'s names; other names stay as they are."""
    parts = [(rf"^feat{in_channels}\.", "input_attention.module."), (r"^feat\d+\.", "projected_attention.module.")]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, ours in parts + _YOLOF_PARTS:
            name, count = re.subn(pattern, ours, name)
            if count:
                break
        renamed[name] = value
    return renamed


def _rename_yolof(module: ELADilatedEncoder, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not any(name.startswith("projector.") for name in own):
        return
    for name in own:
        del state_dict[prefix + name]
    renamed = mmdet_names_of_yolof_encoder(own, module.in_channels)
    state_dict.update({prefix + name: value for name, value in renamed.items()})

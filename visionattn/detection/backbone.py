"""One backbone for mmdet, mmsegmentation and their kin: any feature pyramid of the zoo and of timm."""

import contextlib
import fnmatch
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.layers import Format, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .pyramid import SimpleFeaturePyramid
from .registry import MODELS
from .traits import Layers, Traits, drop_tail, layers_of, takes_argument, traits_of
from .weights import CheckpointError, load_donor, read, source_of

__all__ = ["Backbone"]

PYRAMID_STRIDES = (4, 8, 16, 32)


@MODELS.register_module()
class Backbone(BaseModule):
    """Feature maps of a registered model, as OpenMMLab's detectors and segmentors take them.

    ``dict(type='visionattn.Backbone', model='agent_swin_tiny', out_indices=(0, 1, 2, 3), ...)``, after
    ``custom_imports = dict(imports=['visionattn.detection'])``. Takes (B, ``in_channels``, H, W) and returns a tuple
    of maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), one per output, for any H and W: images are padded with zeros on
    the right and at the bottom to what the model takes, and its maps are cropped. Maps that the model gives
    channels-last are turned; those of networks with unpadded convolutions (Inception) are resized. A model with one
    stride (a plain vision transformer) gets a simple feature pyramid of strides 4, 8, 16, 32.

    Args:
        model: registered name, with or without a tag.
        out_indices: which maps, as timm counts them: indices into the model's ``feature_info`` (for a ResNet, 0 is the
            stem at stride 2), for a simple feature pyramid into its four levels. By default those at strides of 4 and
            more, at most four.
        frozen_stages: freeze the stem (0), and the first stages that give maps at strides of 4 and more (1 and up;
            blocks of a plain vision transformer). -1 freezes nothing.
        norm_eval: batch norms stay in evaluation mode.
        with_cp: recompute activations in the backward pass.
        drop_path_rate: the model's own by default.
        out_norm: a layer norm on each output, new and trained: the model's own (``norm0`` ..., ``extra_norms``) where
            it has them, otherwise ``norm{i}`` here.
        img_size: 'dynamic', or (height, width) that the model is built for, which is then the largest it takes if it
            can't do with any size. 'dynamic' is refused by models of one size.
        size_divisor: multiple that images are padded to; found out by default.
        pyramid: further arguments of :class:`SimpleFeaturePyramid`, such as ``dict(out_channels=256)``.
        in_channels: of the images.
        pretrained: short for ``init_cfg=dict(type='Pretrained', checkpoint=pretrained)``.
        init_cfg: ``dict(type='Pretrained', checkpoint=..., prefix=None)`` loads, when ``init_weights()`` is called, a
            file of the authors' classifier or of ours, an address, ``'hf-hub:...'``, a tag (``'in1k'``,
            ``'agent_swin_tiny.in1k'``), or under a ``prefix`` (``'backbone.'``) the backbone in a detector's file.
        **kwargs: of the model, such as ``agent_shapes``.

    Attributes:
        out_channels, strides: of the maps.
        out_indices: as resolved.

    Raises:
        ValueError: for an unknown model, an index that it does not have, 'dynamic' for a model of one size.
        TypeError: for an argument that the model does not take.
        CheckpointError, FileNotFoundError: from ``init_weights()``, for a file that is not the model's.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        out_norm: bool = False,
        img_size: str | int | Sequence[int] = "dynamic",
        size_divisor: int | None = None,
        pyramid: Mapping[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: str | bool | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if pretrained:
            if init_cfg is not None:
                raise ValueError("give the weights by pretrained or by init_cfg, not by both")
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        super().__init__(init_cfg)
        self.model = model
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        args: dict[str, Any] = dict(kwargs, in_chans=in_channels)
        args.pop("features_only", None)  # goes without saying
        if "checkpoint_path" in args:
            raise TypeError("checkpoint_path loads a classifier: give init_cfg=dict(type='Pretrained', checkpoint=...)")
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        if img_size != "dynamic":
            args["img_size"] = _sides(img_size)

        traits = traits_of(model, args)
        if img_size == "dynamic":
            _refuse_fixed(traits)
        self.arch = traits.arch
        self.isotropic = traits.isotropic
        self.native = traits.native
        self.divisor = size_divisor or traits.divisor
        self.resized = traits.resized
        self.stages = [level["module"] for level in traits.info if level["reduction"] >= 4]
        self.out_indices = _resolve(out_indices, traits)
        args |= traits.accepted
        own_norms = out_norm and not self.isotropic and takes_argument(self.arch, args, out_norm=True)
        if own_norms:
            args["out_norm"] = True
        self.model_args = args
        self._build(len(traits.info) - 1, pyramid)
        self.norm_names: list[str] = []
        if out_norm and not own_norms:
            for i, channels in zip(self.out_indices, self.out_channels, strict=True):
                self.add_module(f"norm{i}", nn.LayerNorm(channels))
                self.norm_names.append(f"norm{i}")
        if with_cp:
            self._checkpoint_activations()
        self._freeze_stages()
        self.register_load_state_dict_pre_hook(_translate_foreign_names)

    def _build(self, last: int, pyramid: Mapping[str, Any] | None) -> None:
        """The feature extractor, and the simple feature pyramid behind map ``last`` of a model with one stride."""
        if pyramid and not self.isotropic:
            raise ValueError(f"pyramid={pyramid} is for models with one stride, {self.arch} has several: leave it out")
        indices = (last,) if self.isotropic else self.out_indices
        self.build_args = dict(self.model_args, features_only=True, out_indices=indices)
        self.net = drop_tail(timm.create_model(self.model, **self.build_args))
        _forget_num_classes(self.net)
        self._channels_last = getattr(self.net, "output_fmt", None) == Format.NHWC
        levels = self.net.feature_info.get_dicts()
        self.strides = [level["reduction"] for level in levels]
        self.out_channels = [level["num_chs"] for level in levels]
        self.pyramid: nn.Module | None = None
        if self.isotropic:
            chosen = [PYRAMID_STRIDES[i] for i in self.out_indices]
            self.pyramid = SimpleFeaturePyramid(self.out_channels[0], self.strides[0], chosen, **(pyramid or {}))
            self.strides, self.out_channels = chosen, self.pyramid.channels

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = (x.shape[2], x.shape[3])
        maps = self._maps(self._pad(x))
        if self.pyramid is not None:
            maps = self.pyramid(maps[0])
        outputs = []
        for i, (y, stride) in enumerate(zip(maps, self.strides, strict=True)):
            target = (-(-size[0] // stride), -(-size[1] // stride))
            if self.resized:
                y = F.interpolate(y, target, mode="bilinear", align_corners=False)
            y = y[:, :, : target[0], : target[1]]
            if self.norm_names:
                y = getattr(self, self.norm_names[i])(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            outputs.append(y.contiguous())
        return tuple(outputs)

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = self.net(x)
        if self._channels_last:
            return [y.permute(0, 3, 1, 2) for y in maps]
        return list(maps)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[2], x.shape[3])
        if self.divisor is not None:
            target = tuple(-(-side // self.divisor) * self.divisor for side in size)
        else:
            target = self.native
            if size[0] > target[0] or size[1] > target[1]:
                raise ValueError(
                    f"{self.arch} was built for images of up to {target[0]} x {target[1]} px (img_size), got "
                    f"{size[0]} x {size[1]}: give a larger img_size"
                )
        if target == size:
            return x
        return F.pad(x, (0, target[1] - size[1], 0, target[0] - size[0]))

    def _checkpoint_activations(self) -> None:
        try:
            getattr(self.net, "model", self.net).set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.arch} can't recompute activations (set_grad_checkpointing): use with_cp=False"
            ) from error

    # training

    @functools.cached_property
    def _layers(self) -> Layers:
        return layers_of(self.model, self.model_args)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Parameters by depth (timm's ``group_matcher``): names here to layers 0, 1 ..., and the number of layers.

        The last layer is the classifier's in timm's own layer decay; what the adapter adds belongs to it.
        """
        layers = {_flat(name): layer for name, layer in self._layers.of.items()}
        last = self._layers.count - 1
        return {name: layers.get(_flat(_bare(name)), last) for name, _ in self.named_parameters()}, last + 1

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the model wants no weight decay for."""
        patterns = [_flat(pattern) for pattern in self._layers.no_weight_decay]
        names = [name for name, _ in self.named_parameters()]
        return {n for n in names if any(fnmatch.fnmatchcase(_flat(_bare(n)), pattern) for pattern in patterns)}

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        if self.frozen_stages > len(self.stages):
            raise ValueError(
                f"frozen_stages={self.frozen_stages}: {self.arch} has {len(self.stages)} stages; -1 freezes nothing"
            )
        # the classifier's own parameters: norms of the outputs are new, and stay free
        layers = layers_of(self.model, {k: v for k, v in self.model_args.items() if k != "out_norm"})
        deepest = max((layers.last_in(stage) for stage in self.stages[: self.frozen_stages]), default=0)
        frozen = {_flat(name) for name, layer in layers.of.items() if layer <= deepest}
        for name, parameter in self.named_parameters():
            if name.startswith("net.") and _flat(_bare(name)) in frozen:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Backbone":
        _restore_activations(self.net)  # the Runner converts before it comes here
        super().train(mode)
        if not mode:
            return self
        if self.frozen_stages >= 0:
            _rest_frozen(self.net)
        if self.norm_eval:
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    # weights

    def init_weights(self) -> None:
        """mmengine's hook: what ``init_cfg`` says, weights last."""
        if self._is_init:
            return
        given = self.init_cfg
        cfgs = [given] if isinstance(given, Mapping) else list(given or [])
        files = [cfg for cfg in cfgs if cfg.get("type") == "Pretrained"]
        self.init_cfg = [cfg for cfg in cfgs if cfg.get("type") != "Pretrained"] or None
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        self._is_init = False  # until the weights are there
        for cfg in files:
            self.load(cfg["checkpoint"], cfg.get("prefix"))
            print_log(f"{self.arch}: weights loaded from {cfg['checkpoint']}", logger="current")
        self._is_init = True

    def load(self, checkpoint: str | os.PathLike | bool, prefix: str | None = None) -> None:
        """Loads weights, see ``init_cfg``.

        Raises:
            FileNotFoundError, ValueError: for a checkpoint that is not there.
            CheckpointError: for one that can't be read, or is not the model's.
        """
        name, overlay = source_of(self.arch, checkpoint)
        if overlay.get("file"):
            state = read(overlay["file"], prefix)
            if any(key.startswith("net.") for key in state):
                self._load_own(state, str(checkpoint))
                return
            if prefix:
                overlay = dict(state_dict=state)
        elif prefix:
            raise ValueError(f"prefix={prefix!r} goes with a file, not with checkpoint={checkpoint!r}")
        state = load_donor(name, self.build_args, overlay).state_dict()
        own = self.net.state_dict()
        if more := [name for name in state if name not in own]:  # a NAT takes a file's norms as its own
            raise CheckpointError(
                f"checkpoint {checkpoint} holds norms of the outputs ({', '.join(more[:3])}): give out_norm=True"
            )
        self.net.load_state_dict(state)

    def _load_own(self, state: Mapping[str, torch.Tensor], label: str) -> None:
        """Weights under this adapter's own names."""
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) + [n for n in own if n in state and own[n].shape != state[n].shape]
        if wrong:
            raise CheckpointError(
                f"checkpoint {label} is of another backbone than {self.arch} with these arguments: {len(wrong)} names "
                f"or shapes differ ({', '.join(wrong[:3])})"
            )
        self.load_state_dict(state)


def _refuse_fixed(traits: Traits) -> None:
    if traits.divisor is None:
        height, width = traits.native
        raise ValueError(
            f"{traits.arch} takes images of {height} x {width} px only, and detection's sizes vary: give "
            "img_size=(height, width), as large as your largest image, where the model has that argument, or choose "
            "another model"
        )


def _resolve(out_indices: Sequence[int] | int | None, traits: Traits) -> tuple[int, ...]:
    """The indices, none negative; those of the default where they are None."""
    strides = list(PYRAMID_STRIDES) if traits.isotropic else [level["reduction"] for level in traits.info]
    count = len(strides)
    if out_indices is None:
        return tuple(range(count)) if traits.isotropic else traits.default_indices
    asked = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    resolved = tuple(i + count if isinstance(i, int) and -count <= i < 0 else i for i in asked)
    if not resolved or any(not isinstance(i, int) or not 0 <= i < count for i in resolved):
        raise ValueError(
            f"out_indices={asked}: {traits.arch} has {count} maps, 0 to {count - 1}, at strides "
            f"{', '.join(map(str, strides))}: choose among them"
        )
    if sorted(set(resolved)) != list(resolved):
        raise ValueError(f"out_indices={asked} do not ascend: maps come from fine to coarse, list them so")
    return resolved


def _sides(img_size: Any) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    pair = isinstance(sides, Sequence) and len(sides) == 2
    if not pair or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"img_size={img_size!r}: give 'dynamic', or (height, width) in pixels")
    return tuple(sides)


def _bare(name: str) -> str:
    """A parameter's name in timm's model: without the adapter's and the feature extractor's own prefixes."""
    return name.removeprefix("net.").removeprefix("model.").removeprefix("body.")


def _flat(name: str) -> str:
    """timm's extractors write layers_0.blocks for layers.0.blocks."""
    return name.replace(".", "_")


def _forget_num_classes(net: nn.Module) -> None:
    """mmdet's NumClassCheckHook takes every module's ``num_classes`` for a head's."""
    for module in net.modules():
        with contextlib.suppress(AttributeError):
            del module.num_classes


def _restore_activations(module: nn.Module) -> None:
    """Mends what PyTorch's conversion to synchronised batch norms (mmengine's ``sync_bn``) leaves of timm's.

    timm's batch norms have their activation inside; PyTorch's conversion keeps it as a child that nothing calls.
    """
    for child in module.modules():
        if type(child) is nn.SyncBatchNorm and next(child.children(), None) is not None:
            child.__class__ = SyncBatchNormAct


def _rest_frozen(module: nn.Module) -> None:
    """Evaluation mode for modules all of whose parameters are frozen."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        else:
            _rest_frozen(child)


def _translate_foreign_names(module: Backbone, state_dict: dict, prefix: str, *_: Any) -> None:
    """A detector's file of the authors holds the backbone under their names: ours take their place.

    Names that are not the model's stay, for the loader to report or, where it is not strict, to leave out.
    """
    theirs = {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}
    if not theirs or any(name.startswith("net.") for name in theirs):
        return
    try:
        donor = load_donor(module.arch, module.build_args, dict(state_dict=theirs))
    except CheckpointError as error:
        print_log(str(error), logger="current", level=logging.WARNING)
        return
    for name in theirs:
        del state_dict[prefix + name]
    state_dict.update({f"{prefix}net.{name}": value for name, value in donor.state_dict().items()})
    for name, value in module.state_dict().items():
        if not name.startswith("net."):
            state_dict[prefix + name] = theirs.get(name, value)

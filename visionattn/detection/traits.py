"""What a timm model can do as a dense backbone, found out on the meta device: no weights, no arithmetic."""

import copy
import difflib
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Format
from timm.models import group_parameters, model_entrypoint
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from timm.optim import auto_group_layers
from torch import nn

from visionattn._meta import NoResize

__all__ = ["Layers", "Traits", "drop_tail", "layers_in", "layers_of", "traits_of"]

# arguments by which timm's models take any image size; the first set that a model's constructor accepts is used
DYNAMIC = (
    dict(dynamic_img_size=True, dynamic_img_pad=True),
    dict(dynamic_img_size=True),
    dict(strict_img_size=False),
    {},
)
NOT_OF_CLASSIFIERS = ("features_only", "out_indices", "feature_cls", "pretrained", "pretrained_cfg_overlay")
UNPADDED = 6  # cells that networks with unpadded convolutions lose (Inception's stems and cells)


@dataclass(frozen=True)
class Traits:
    """A model's properties as a backbone.

    Attributes:
        arch: registered name, without a tag.
        accepted: arguments, beyond the user's, that the model is built with.
        info: timm's feature_info: a dictionary with num_chs, reduction and module per feature map.
        isotropic: all maps have the same stride, as those of a plain vision transformer.
        divisor: images whose sides are multiples of it go through, and every map's side is the image's over the stride,
            rounded up; None where only ``native`` works.
        resized: the maps miss that size by a few cells, as without padding in convolutions, and have to be resized.
        native: (height, width) of the images that the model is made for.
    """

    arch: str
    accepted: dict[str, Any]
    info: tuple[dict[str, Any], ...]
    isotropic: bool
    divisor: int | None
    resized: bool
    native: tuple[int, int]

    @property
    def default_indices(self) -> tuple[int, ...]:
        """The maps at strides of 4 and more, at most the last four."""
        return tuple(i for i, level in enumerate(self.info) if level["reduction"] >= 4)[-4:]


def architecture(name: str) -> str:
    """The registered name in ``name`` (a tag may follow). ValueError, one line, for a name that is not registered."""
    import visionattn.models  # noqa: F401  registers the zoo

    arch = str(name).partition(".")[0]
    if not isinstance(name, str) or not timm.is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), 3)
        meant = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists those that are"
        raise ValueError(f"model={name!r} is registered neither by visionattn nor by timm: {meant}")
    return arch


def is_ours(arch: str) -> bool:
    return model_entrypoint(arch).__module__.startswith("visionattn.")


def classifier_on_meta(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The whole model that ``kwargs`` of a feature extractor build."""
    return create_on_meta(name, **{k: v for k, v in kwargs.items() if k not in NOT_OF_CLASSIFIERS})


def create_on_meta(name: str, **kwargs: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs).eval()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):  # some constructors read numbers off tensors
            raise
        with torch.device("cpu"):
            return timm.create_model(name, **kwargs).eval().to("meta")


def traits_of(name: str, kwargs: Mapping[str, Any]) -> Traits:
    """The traits of ``timm.create_model(name, **kwargs)``.

    Raises:
        ValueError: for an unknown model, or one without feature maps.
        TypeError: for arguments that it does not take.
    """
    try:
        frozen = repr(sorted(kwargs.items()))
    except Exception:  # an argument without a stable text
        frozen = None
    if frozen is None or "0x" in frozen:
        return _traits_of(name, dict(kwargs))
    return copy.deepcopy(_cached(name, frozen, _Uncompared(kwargs)))


class _Uncompared(dict):
    """Arguments that go past the cache's key, which has their text."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return True


@functools.lru_cache(maxsize=64)
def _cached(name: str, frozen: str, kwargs: _Uncompared) -> Traits:
    return _traits_of(name, dict(kwargs))


def _traits_of(name: str, kwargs: dict[str, Any]) -> Traits:
    arch = architecture(name)
    candidates = ({},) if is_ours(arch) else DYNAMIC
    net, accepted = None, {}
    for accepted in candidates:
        try:
            net = _features_on_meta(name, dict(accepted, **kwargs))
            break
        except TypeError as error:
            if accepted is candidates[-1]:
                advice = "; it is of no size, leave img_size='dynamic'" if "'img_size'" in str(error) else ""
                raise TypeError(f"{arch}: {_one_line(error)}{advice}") from error
        except RuntimeError as error:
            if "features_only" in str(error):
                raise ValueError(
                    f"{arch} gives no feature maps (timm: features_only): choose another model as a backbone"
                ) from error
            raise
    info = tuple(dict(level) for level in net.feature_info.info)
    strides = {level["reduction"] for level in info}
    native = _native_size(net, kwargs)
    divisor, resized = _divisor(net, native, kwargs)
    if divisor is None and _deviation(net, native, kwargs.get("in_chans", 3)) != 0:
        raise ValueError(
            f"{arch}'s maps are not of the image's size over their strides, not even at {native[0]} x {native[1]} px, "
            "so boxes would be off: choose another model"
        )
    return Traits(arch, accepted, info, len(strides) == 1, divisor, resized, native)


def _features_on_meta(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return create_on_meta(name, features_only=True, **kwargs)
    except AssertionError:  # shallower than timm's three last blocks
        return create_on_meta(name, features_only=True, out_indices=1, **kwargs)


def drop_tail(net: nn.Module) -> nn.Module:
    """The feature extractor without the blocks behind its last map, which two of timm's kinds keep.

    They cost time, and under DistributedDataParallel parameters without a gradient stop the training.
    """
    if isinstance(net, EfficientNetFeatures | MobileNetV3Features) and net.feature_hooks is None:
        net.blocks = net.blocks[: max(level["stage"] for level in net.feature_info.get_dicts())]
    return net


def _native_size(net: nn.Module, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    size = kwargs.get("img_size")
    if size is None:
        return tuple(net.pretrained_cfg.get("input_size") or (3, 224, 224))[1:]
    return (size, size) if isinstance(size, int) else tuple(size)


def _divisor(net: nn.Module, native: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The smallest of some likely numbers whose multiples the model takes, and whether its maps need resizing."""
    deepest = max(level["reduction"] for level in net.feature_info.get_dicts())
    chans = kwargs.get("in_chans", 3)
    odd = _deviation(net, (native[0] + 45, native[1] + 83), chans)
    if odd == 0:
        return 1, False
    # 7 and 8 are the usual windows
    for divisor in sorted({deepest, 2 * deepest, 7 * deepest, 8 * deepest, max(native)}):
        times = native[0] // divisor + 1
        times += 1 - times % 2  # odd, so that no multiple of a larger number passes
        if _deviation(net, (times * divisor, (times + 2) * divisor), chans) == 0:
            return divisor, False
    if odd is not None and odd <= UNPADDED:
        return 1, True
    return None, False


def _deviation(net: nn.Module, size: tuple[int, int], chans: int) -> int | None:
    """By how many cells maps miss the size of the image over their stride, rounded up; None where they can't be had."""
    try:
        with torch.no_grad(), NoResize():
            maps = net(torch.empty(1, chans, *size, device="meta"))
    except Exception:
        return None
    last = getattr(net, "output_fmt", None) == Format.NHWC
    worst = 0
    for y, level in zip(maps, net.feature_info.get_dicts(), strict=True):
        expected = _shape(level, size, last)
        if y.ndim != 4 or y.shape[-1 if last else 1] != level["num_chs"]:
            return None
        worst = max(worst, *(abs(a - b) for a, b in zip(y.shape[1:], expected, strict=True)))
    return worst


def _shape(level: Mapping[str, Any], size: tuple[int, int], channels_last: bool) -> tuple[int, int, int]:
    height, width = (-(-side // level["reduction"]) for side in size)
    channels = level["num_chs"]
    return (height, width, channels) if channels_last else (channels, height, width)


@dataclass(frozen=True)
class Layers:
    """A classifier's parameters by depth, as timm's layer decay has them.

    Attributes:
        of: parameter names to layers; the stem's is 0, the classifier's the last. Final norms belong to the last block.
        count: number of layers.
        no_weight_decay: names, or patterns, that the model wants no weight decay for.
        modules: names of all modules, in the order of their definition.
    """

    of: dict[str, int]
    count: int
    no_weight_decay: set[str]
    modules: list[str]

    def last_in(self, module: str) -> int:
        """The deepest layer in a module; what is defined before it where it has no parameters."""
        own = [layer for name, layer in self.of.items() if name.startswith(f"{module}.")]
        if own:
            return max(own)
        before = set(self.modules[: self.modules.index(module)]) if module in self.modules else set()
        return max((layer for name, layer in self.of.items() if name.rpartition(".")[0] in before), default=0)


def layers_of(name: str, kwargs: Mapping[str, Any]) -> Layers:
    """The layers of ``timm.create_model(name, **kwargs)``, by its ``group_matcher``, or timm's guess without one."""
    return layers_in(classifier_on_meta(name, {**kwargs, "num_classes": 1}))


def layers_in(model: nn.Module) -> Layers:
    """The layers of a model of timm's; where it has no classifier, one more is counted for what stands behind it."""
    if hasattr(model, "group_matcher"):
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(model)
    no_decay = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    count = max(layers.values(), default=0) + (1 if getattr(model, "num_classes", 1) else 2)
    return Layers(layers, count, no_decay, [n for n, _ in model.named_modules()])


def takes_argument(arch: str, kwargs: Mapping[str, Any], **argument: Any) -> bool:
    """Whether a model of ours has a constructor argument."""
    if not is_ours(arch):
        return False
    full = classifier_on_meta(arch, kwargs)
    return set(argument) <= set(inspect.signature(type(full).__init__).parameters)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

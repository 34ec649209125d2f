"""A sound model and broken variants of it, one defect each: the proof that the conformance tests discriminate."""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

# model: the test kinds of plugin.TESTS that have to fail
DEFECTS: dict[str, set[str]] = {
    "sound": set(),
    "swallows_arguments": {"cfg"},
    "unused_parameter": {"backward", "fxbackward", "prune"},
    "wrong_first_conv": {"cfg"},
    "wrong_reduction": {"features"},
    "checkpointing_differs": {"forward"},
}


def checkpoint_filter_fn(state_dict, model):
    return state_dict


class Swallowing(ResNet):
    def __init__(self, *args: Any, not_a_model_arg: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)


class Unused(ResNet):
    def __init__(self, *args: Any, device=None, dtype=None, **kwargs: Any):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.gate = nn.Parameter(torch.ones(1, device=device, dtype=dtype))


class WrongReduction(ResNet):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.feature_info[-1]["reduction"] = 16


class Checkpointing(ResNet):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        nn.init.ones_(self.fc.bias)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    cfg = dict(num_classes=1000, input_size=(3, 64, 64), pool_size=(2, 2), first_conv="conv1", classifier="fc")
    return {**cfg, **kwargs}


default_cfgs = generate_default_cfgs(
    {name: _cfg(first_conv="conv7") if name == "wrong_first_conv" else _cfg() for name in DEFECTS}
)


def _create(cls: type[ResNet], variant: str, pretrained: bool, **kwargs: Any) -> ResNet:
    args = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_width=16)
    return build_model_with_cfg(cls, variant, pretrained, **dict(args, **kwargs))


@register_model
def sound(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(ResNet, "sound", pretrained, **kwargs)


@register_model
def swallows_arguments(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(Swallowing, "swallows_arguments", pretrained, **kwargs)


@register_model
def unused_parameter(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(Unused, "unused_parameter", pretrained, **kwargs)


@register_model
def wrong_first_conv(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(ResNet, "wrong_first_conv", pretrained, **kwargs)


@register_model
def wrong_reduction(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(WrongReduction, "wrong_reduction", pretrained, **kwargs)


@register_model
def checkpointing_differs(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create(Checkpointing, "checkpointing_differs", pretrained, **kwargs)

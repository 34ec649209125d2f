"""Modules that weigh places instead of mixing tokens: their masks and gates."""

from torch import nn

from visionattn.layers.ela import ELA
from visionattn.layers.nin import MixerGatingUnit
from visionattn.layers.ulsam import ULSAM

from .registry import Call, register_map
from .result import Explanation
from .softmax import locate


@register_map(ULSAM)
def ulsam(layer: nn.Module, call: Call) -> Explanation:
    """One softmax over the places for each group of channels: ``y = x A + x``."""
    x = call.x
    return Explanation("mask", values=x, mask=layer.attention(x), added={"input": x})


@register_map(ELA)
def ela(layer: nn.Module, call: Call) -> Explanation:
    """The row gate times the column gate, one mask for each channel, between 0 and 1: ``y = x A``."""
    x = call.x
    rows, columns = layer.gates(x)
    return Explanation("mask", values=x, mask=rows.unsqueeze(3) * columns.unsqueeze(2))


@register_map(MixerGatingUnit)
def nin(layer: nn.Module, call: Call) -> Explanation:
    """What the inner mixer block gives, one signed gate for each token and channel: ``y = (x W + b) gate``."""
    x = call.x
    gate, values = layer.Mixer(x), layer.proj(x)
    where = locate(x.shape[1], call)
    if where is not None and where[0].name == "grid":
        gate, values = (t.transpose(1, 2).unflatten(2, where[0].shape) for t in (gate, values))
    return Explanation("gate", values=values, mask=gate)

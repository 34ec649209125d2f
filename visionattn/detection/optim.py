"""Learning rates that decay with depth, for any backbone: timm's ``group_matcher`` knows the depth.

mmdet's own constructor knows ConvNeXt only.
"""

import fnmatch
import logging
from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from .backbone import Backbone
from .registry import OPTIM_WRAPPER_CONSTRUCTORS
from .traits import layers_in

__all__ = ["LayerDecayOptimWrapperConstructor"]

OPTIONS = ("decay_rate", "custom_keys", "no_decay_1d")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scales the learning rate of a backbone's layer i by ``decay_rate ** (last - i)``; heads and necks keep it whole.

    ``optim_wrapper = dict(constructor='visionattn.LayerDecayOptimWrapperConstructor', optimizer=...,
    paramwise_cfg=dict(decay_rate=0.8))``. Layers are those of timm's ``param_groups_layer_decay``: every
    :class:`Backbone` in the model is found, and every module that has timm's ``group_matcher``. Without weight decay go
    parameters of one axis (norms, biases) in the whole model, and what a backbone's ``no_weight_decay()`` names.

    ``paramwise_cfg``:

    - ``decay_rate``: in (0, 1]; 1 leaves the weight-decay rules alone at work.
    - ``custom_keys``: mmengine's, a part of a parameter's name to ``dict(lr_mult=..., decay_mult=...)``; the longest
      key that fits is taken, and multiplies.
    - ``no_decay_1d``: False gives parameters of one axis the weight decay of all others.

    Raises:
        ValueError: for other options, a ``decay_rate`` outside of (0, 1], an optimizer without ``lr``, a model without
            such a backbone.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = sorted(set(self.paramwise_cfg) - set(OPTIONS))
        if unknown:
            raise ValueError(f"paramwise_cfg has {', '.join(unknown)}; layer decay takes {', '.join(OPTIONS)}")
        rate = self.paramwise_cfg.get("decay_rate")
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg's decay_rate={rate!r}: give a number above 0, at most 1, such as 0.8")
        if self.base_lr is None:
            raise ValueError("layer decay scales the optimizer's lr: give one")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Adds a group per learning rate and weight decay to ``params``."""
        scales, no_decay = self._by_depth(module)
        if not scales:
            raise ValueError(
                "layer decay found no visionattn.Backbone and no module with timm's group_matcher in the model: use "
                "mmengine's own constructor"
            )
        groups: dict[tuple[float, float | None], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = scales.get(name, 1.0)
            decay = self.base_wd
            flat = parameter.ndim <= 1 and self.paramwise_cfg.get("no_decay_1d", True)
            if decay is not None and (flat or name in no_decay):
                decay = 0.0
            custom = self._custom(name)
            scale *= custom.get("lr_mult", 1.0)
            if decay is not None:
                decay *= custom.get("decay_mult", 1.0)
            group = groups.setdefault((scale, decay), self._group(scale, decay))
            group["params"].append(parameter)
            group["param_names"].append(name)
        params.extend(groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1] or 0.0)))
        for group in params:
            first, count = group["param_names"][0], len(group["params"])
            text = f"lr_scale {group['lr_scale']:.4g}, weight decay {group.get('weight_decay')}: {count} parameters"
            print_log(f"layer decay: {text}, {first} ...", logger="current", level=logging.DEBUG)

    def _group(self, scale: float, decay: float | None) -> dict[str, Any]:
        group = dict(params=[], param_names=[], lr=self.base_lr * scale, lr_scale=scale)
        return group if decay is None else group | dict(weight_decay=decay)

    def _custom(self, name: str) -> dict[str, float]:
        keys = self.paramwise_cfg.get("custom_keys", {})
        fitting = sorted((key for key in keys if key in name), key=lambda key: (-len(key), key))
        return keys[fitting[0]] if fitting else {}

    def _by_depth(self, model: nn.Module) -> tuple[dict[str, float], set[str]]:
        """Scales of the parameters in backbones, and the names that have no weight decay there."""
        rate = float(self.paramwise_cfg["decay_rate"])
        scales: dict[str, float] = {}
        no_decay: set[str] = set()
        for prefix, backbone in backbones(model):
            if isinstance(backbone, Backbone):
                ids, count = backbone.layer_ids()
                exempt = backbone.no_weight_decay()
            else:
                layers = layers_in(backbone)
                ids, count = layers.of, layers.count
                patterns = layers.no_weight_decay
                exempt = {name for name in ids if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
            scales |= {prefix + name: rate ** (count - 1 - layer) for name, layer in ids.items()}
            no_decay |= {prefix + name for name in exempt}
        return scales, no_decay


def backbones(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules whose depth is known, with the prefix of their parameters' names."""
    if isinstance(model, Backbone) or hasattr(model, "group_matcher"):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from backbones(child, f"{prefix}{name}.")

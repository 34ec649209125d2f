"""timm's private parts that the models need, in one place: a timm release that moves one breaks one import."""

from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models._manipulate import checkpoint, checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model

__all__ = [
    "InvertedResidual",
    "build_model_with_cfg",
    "checkpoint",
    "checkpoint_seq",
    "decode_arch_def",
    "feature_take_indices",
    "generate_default_cfgs",
    "register_model",
    "round_channels",
    "update_model_input_size",
]

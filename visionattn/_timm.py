"""timm's private parts that the models need, in one place: a timm release that moves one breaks one import."""

from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models._manipulate import checkpoint, checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model

__all__ = [
    "build_model_with_cfg",
    "checkpoint",
    "checkpoint_seq",
    "feature_take_indices",
    "generate_default_cfgs",
    "register_model",
    "update_model_input_size",
]

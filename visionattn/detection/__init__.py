"""Backbones of the zoo, and of timm, under mmdet. Needs the extra ``detection``."""

from .mmcv_ext import ensure_mmcv_ops

ensure_mmcv_ops()  # before anything imports mmdet.models or mmcv.ops

__all__ = ["ensure_mmcv_ops"]

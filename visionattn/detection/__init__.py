"""Backbones of the zoo, and of timm, under mmdet and its kin. Needs the extra ``detection``.

Importing it registers ``type='visionattn.Backbone'`` and the modules of detectors with mmengine, and supplies mmcv's
operators from torchvision where mmcv was built without them.
"""

import importlib.util

# mmsegmentation and others can use the backbone without mmdet; without any of them nothing here has a use
if importlib.util.find_spec("mmengine") is None or not any(
    importlib.util.find_spec(package) for package in ("mmdet", "mmseg", "mmpretrain", "mmpose")
):
    from visionattn._extras import missing_extra

    raise missing_extra(
        "visionattn.detection needs mmdet: pip install 'visionattn[detection]' (in a checkout: pip install -e "
        "'.[detection]')"
    )

from .mmcv_ext import ensure_mmcv_ops

ensure_mmcv_ops()  # before anything imports mmdet.models or mmcv.ops

from .packages import find_by_import_name  # noqa: E402

find_by_import_name()  # before a config that inherits from mmseg's is read

from .registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402

_LAZY = {
    "Backbone": ".backbone",
    "ELADilatedEncoder": ".ela",
    "ELAYOLOX": ".ela",
    "ELAYOLOXPAFPN": ".ela",
    "LayerDecayOptimWrapperConstructor": ".optim",
    "SimpleFeaturePyramid": ".pyramid",
}

__all__ = ["MODELS", "OPTIM_WRAPPER_CONSTRUCTORS", "ensure_mmcv_ops", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

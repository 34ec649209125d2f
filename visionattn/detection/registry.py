"""The scope ``visionattn`` in mmengine's registries.

mmengine takes what stands before the dot of ``type='visionattn.Backbone'`` for the scope of a child registry. The
children here hang on mmengine's root, so mmdet, mmsegmentation and every other OpenMMLab package find them.
"""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

__all__ = ["MODELS", "OPTIM_WRAPPER_CONSTRUCTORS"]

# the modules are imported when something is first looked up: those of detectors need mmdet, and that takes seconds
MODELS = Registry("model", parent=ROOT_MODELS, scope="visionattn", locations=["visionattn.detection.modules"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="visionattn",
    locations=["visionattn.detection.optim"],
)

# registers visionattn.Backbone and, where mmcv has no compiled operators, torchvision's in their place
custom_imports = dict(imports=["visionattn.detection"], allow_failed_imports=False)

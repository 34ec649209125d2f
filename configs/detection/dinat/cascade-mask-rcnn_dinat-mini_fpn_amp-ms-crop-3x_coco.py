_base_ = [
    "../_base_/cascade-mask-rcnn_4conv1fc.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_3x_adamw.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/visionattn.py",
]

# detection has its own dilations
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="dinat_mini",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        out_norm=True,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

optim_wrapper = dict(type="AmpOptimWrapper")

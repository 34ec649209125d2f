_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_1x_adamw.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/visionattn.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="inline_swin_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="inline_swin_tiny.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

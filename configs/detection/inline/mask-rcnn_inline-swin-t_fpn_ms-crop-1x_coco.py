_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco-instance_ms-crop.py",
    "mmdet::_base_/schedules/schedule_1x.py",
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

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)

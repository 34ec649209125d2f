_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/visionattn.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="ulsam_mobilenetv2_100",
        out_indices=(1, 2, 3, 4),
    ),
    neck=dict(in_channels=[24, 32, 96, 320]),
)

optim_wrapper = dict(optimizer=dict(lr=0.01))

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
        model="mala_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="mala_tiny.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

sync_bn = "torch"  # the stem's and the mergings' batch norms, in a distributed run

optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0004, weight_decay=0.0001),
)
# stage 1's map is not used: its output norm gets no gradient
find_unused_parameters = True

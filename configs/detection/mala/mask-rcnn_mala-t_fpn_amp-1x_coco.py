_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedule_1x_adamw.py",
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

optim_wrapper = dict(type="AmpOptimWrapper", optimizer=dict(lr=0.0004))

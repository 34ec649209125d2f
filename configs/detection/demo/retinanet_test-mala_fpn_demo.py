_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "../_base_/demo.py"]

model = dict(
    backbone=dict(
        _delete_=True, type="visionattn.Backbone", model="test_mala", out_indices=(0, 1, 2, 3), drop_path_rate=0.0
    ),
    # trained from nothing, which normalised heads make short
    neck=dict(norm_cfg=dict(type="BN"), in_channels=[16, 32, 48, 64], out_channels=64, start_level=1, num_outs=3),
    bbox_head=dict(
        num_classes=13,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=8),
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32]),
    ),
    # anchors are matched on the CPU: on a GPU every picture would wait for dozens of answers
    train_cfg=dict(assigner=dict(gpu_assign_thr=0.5)),
)

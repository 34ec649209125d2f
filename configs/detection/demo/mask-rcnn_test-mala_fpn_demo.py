_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/demo.py"]

model = dict(
    backbone=dict(
        _delete_=True, type="visionattn.Backbone", model="test_mala", out_indices=(0, 1, 2, 3), drop_path_rate=0.0
    ),
    neck=dict(norm_cfg=dict(type="BN"), in_channels=[16, 32, 48, 64], out_channels=64, num_outs=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[5], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=13),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=13),
    ),
    # regions are matched on the CPU: on a GPU every picture would wait for dozens of answers
    train_cfg=dict(
        rpn=dict(assigner=dict(gpu_assign_thr=0.5), sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(assigner=dict(gpu_assign_thr=0.5), sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100), rcnn=dict(max_per_img=50)),
)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=max_epochs, end=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator

_base_ = "./mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="nat_small",
        drop_path_rate=0.35,
        init_cfg=dict(checkpoint="nat_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

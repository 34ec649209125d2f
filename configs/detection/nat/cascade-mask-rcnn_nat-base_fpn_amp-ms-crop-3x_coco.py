_base_ = "./cascade-mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="nat_base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="nat_base.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

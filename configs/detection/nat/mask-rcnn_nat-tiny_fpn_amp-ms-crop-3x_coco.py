_base_ = "./mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="nat_tiny",
        init_cfg=dict(checkpoint="nat_tiny.in1k"),
    ),
)

_base_ = "./cascade-mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="nat_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="nat_tiny.in1k"),
    ),
)

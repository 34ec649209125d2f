_base_ = "./cascade-mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="dinat_small",
        drop_path_rate=0.5,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
        init_cfg=dict(checkpoint="dinat_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

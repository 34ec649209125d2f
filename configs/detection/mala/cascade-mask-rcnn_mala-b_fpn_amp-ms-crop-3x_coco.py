_base_ = "./cascade-mask-rcnn_mala-s_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model="mala_base", drop_path_rate=0.4, init_cfg=dict(checkpoint="mala_base.in1k")),
    neck=dict(in_channels=[96, 192, 384, 512]),
)

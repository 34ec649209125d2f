_base_ = "./retinanet_mala-t_fpn_amp-1x_coco.py"

model = dict(
    backbone=dict(model="mala_small", drop_path_rate=0.15, init_cfg=dict(checkpoint="mala_small.in1k")),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

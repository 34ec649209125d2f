_base_ = "./mala-t_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="mala_small", drop_path_rate=0.15, init_cfg=dict(checkpoint="mala_small.in1k")),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

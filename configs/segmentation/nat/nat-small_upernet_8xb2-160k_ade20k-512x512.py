_base_ = "./nat-mini_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="nat_small", drop_path_rate=0.5, init_cfg=dict(checkpoint="nat_small.in1k")),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

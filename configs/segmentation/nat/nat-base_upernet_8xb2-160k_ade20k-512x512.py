_base_ = "./nat-mini_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="nat_base", drop_path_rate=0.5, init_cfg=dict(checkpoint="nat_base.in1k")),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

_base_ = "./mala-t_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="mala_small", drop_path_rate=0.15, init_cfg=dict(checkpoint="mala_small.in1k")),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

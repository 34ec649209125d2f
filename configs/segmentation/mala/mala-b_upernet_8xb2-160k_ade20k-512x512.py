_base_ = "./mala-t_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="mala_base", drop_path_rate=0.4, init_cfg=dict(checkpoint="mala_base.in1k")),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)

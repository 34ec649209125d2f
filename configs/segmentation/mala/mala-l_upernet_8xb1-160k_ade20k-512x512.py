_base_ = "./mala-t_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="mala_large", drop_path_rate=0.55, init_cfg=dict(checkpoint="mala_large.in1k")),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)

train_dataloader = dict(batch_size=1)

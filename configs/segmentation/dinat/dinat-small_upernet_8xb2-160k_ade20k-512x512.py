_base_ = "./dinat-mini_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        model="dinat_small",
        drop_path_rate=0.5,
        dilations=((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1)),
        init_cfg=dict(checkpoint="dinat_small.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

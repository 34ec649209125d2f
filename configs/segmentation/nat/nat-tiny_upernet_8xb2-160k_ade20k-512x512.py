_base_ = "./nat-mini_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="nat_tiny", drop_path_rate=0.3, init_cfg=dict(checkpoint="nat_tiny.in1k")),
)

_base_ = "./agent-swin-t_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="agent_swin_base", drop_path_rate=0.5, init_cfg=dict(checkpoint="agent_swin_base.in1k")),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

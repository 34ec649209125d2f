_base_ = "./agent-swin-t_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        model="agent_swin_small",
        drop_path_rate=0.3,
        agent_shapes=((9, 9), (12, 12), (7, 7), (7, 7)),
        init_cfg=dict(checkpoint="agent_swin_small.in1k"),
    ),
)

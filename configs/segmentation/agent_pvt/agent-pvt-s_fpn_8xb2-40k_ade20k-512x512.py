_base_ = "./agent-pvt-t_fpn_8xb2-40k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="agent_pvt_small", drop_path_rate=0.1, init_cfg=dict(checkpoint="agent_pvt_small.in1k")),
)

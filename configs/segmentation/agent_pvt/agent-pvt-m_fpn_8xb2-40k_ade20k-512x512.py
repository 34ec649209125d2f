_base_ = "./agent-pvt-t_fpn_8xb2-40k_ade20k-512x512.py"

model = dict(
    backbone=dict(model="agent_pvt_medium", drop_path_rate=0.2, init_cfg=dict(checkpoint="agent_pvt_medium.in1k")),
)

_base_ = "./retinanet_agent-pvt-t_fpn_1x_coco.py"

model = dict(
    backbone=dict(model="agent_pvt_small", init_cfg=dict(checkpoint="agent_pvt_small.in1k")),
)

_base_ = "./retinanet_agent-pvt-t_fpn_1x_coco.py"

model = dict(
    backbone=dict(model="agent_pvt_large", drop_path_rate=0.3, init_cfg=dict(checkpoint="agent_pvt_large.in1k")),
)

_base_ = "./mask-rcnn_agent-swin-t_fpn_ms-crop-1x_coco.py"

model = dict(
    backbone=dict(model="agent_swin_small", init_cfg=dict(checkpoint="agent_swin_small.in1k")),
)

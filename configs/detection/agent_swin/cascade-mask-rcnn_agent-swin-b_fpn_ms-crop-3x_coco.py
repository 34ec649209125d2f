_base_ = "./cascade-mask-rcnn_agent-swin-t_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model="agent_swin_base", drop_path_rate=0.4, init_cfg=dict(checkpoint="agent_swin_base.in1k")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

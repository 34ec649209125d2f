_base_ = "./mask-rcnn_halo-h0_fpn_1x_coco.py"

model = dict(
    backbone=dict(model="halo_h1"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

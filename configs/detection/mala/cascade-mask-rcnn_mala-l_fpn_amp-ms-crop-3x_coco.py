_base_ = "./cascade-mask-rcnn_mala-s_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model="mala_large", drop_path_rate=0.55, init_cfg=dict(checkpoint="mala_large.in1k")),
    neck=dict(in_channels=[96, 192, 448, 640]),
)

train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.0002))

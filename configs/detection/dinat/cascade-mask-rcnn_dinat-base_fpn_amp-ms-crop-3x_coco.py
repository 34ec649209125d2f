_base_ = "./cascade-mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        model="dinat_base",
        drop_path_rate=0.6,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
        init_cfg=dict(checkpoint="dinat_base.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

optim_wrapper = dict(optimizer=dict(lr=0.000075))

_base_ = ["mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py", "../_base_/visionattn.py"]

# the maps of strides 16 and 32; MobileNetV2's last 1 x 1 convolution (to 1280) belongs to the classifier here
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="ulsam_mobilenetv2_100",
        out_indices=(3, 4),
        init_cfg=dict(type="TruncNormal", layer="Conv2d", std=0.03),
    ),
    neck=dict(in_channels=(96, 320), out_channels=(96, 320, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(96, 320, 512, 256, 256, 128)),
)

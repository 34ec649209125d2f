_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k_512x512.py",
    "../_base_/schedule_upernet_160k.py",
    "mmseg::_base_/default_runtime.py",
    "../../detection/_base_/visionattn.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="inline_swin_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="inline_swin_tiny.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

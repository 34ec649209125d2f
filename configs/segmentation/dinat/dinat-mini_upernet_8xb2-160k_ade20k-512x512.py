_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k_512x512.py",
    "../_base_/schedule_upernet_160k.py",
    "mmseg::_base_/default_runtime.py",
    "../../detection/_base_/visionattn.py",
]

# segmentation has its own dilations
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="dinat_mini",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        out_norm=True,
        dilations=((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

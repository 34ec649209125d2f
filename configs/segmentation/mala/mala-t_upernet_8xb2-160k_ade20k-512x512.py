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
        model="mala_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="mala_tiny.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

sync_bn = "torch"  # the stem's and the mergings' batch norms, in a distributed run

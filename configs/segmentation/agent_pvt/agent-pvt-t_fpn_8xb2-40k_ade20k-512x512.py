_base_ = [
    "../_base_/fpn.py",
    "../_base_/ade20k_512x512.py",
    "../_base_/schedule_fpn_40k.py",
    "mmseg::_base_/default_runtime.py",
    "../../detection/_base_/visionattn.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="agent_pvt_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        agent_shapes=((12, 12), (16, 16), (28, 28), (28, 28)),
        init_cfg=dict(type="Pretrained", checkpoint="agent_pvt_tiny.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

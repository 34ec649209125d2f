_base_ = [
    "../_base_/cascade-mask-rcnn_4conv1fc.py",
    "../_base_/coco-instance_ms-crop.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/visionattn.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionattn.Backbone",
        model="agent_swin_tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        out_norm=True,
        agent_shapes=((9, 9), (12, 12), (14, 14), (7, 7)),
        init_cfg=dict(type="Pretrained", checkpoint="agent_swin_tiny.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# neither norms nor tables are decayed
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in (
                "absolute_pos_embed",
                "relative_position_bias_table",
                "norm",
                "an_bias",
                "na_bias",
                "ah_bias",
                "aw_bias",
                "ha_bias",
                "wa_bias",
            )
        }
    ),
)

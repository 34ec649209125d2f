# Swin's: neither norms nor tables are decayed, under whichever name a backbone has them
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in (
                "absolute_pos_embed",
                "relative_position_bias_table",
                "rpb",
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

_base_ = "mmseg::_base_/schedules/schedule_160k.py"

# neither norms nor tables are decayed, under whichever name a backbone has them
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in (
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
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]

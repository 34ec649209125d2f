# UPerNet as Swin and everyone after it trains it on ADE20K
_base_ = "mmseg::_base_/models/upernet_swin.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150), auxiliary_head=dict(num_classes=150)
)

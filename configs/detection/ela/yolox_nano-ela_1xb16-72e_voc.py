# YOLOX-Nano with ELA-T in its PAFPN on VOC2007, the layout of the published checkpoint; 16 images a step, one GPU
_base_ = ["mmdet::yolox/yolox_nano_8xb8-300e_coco.py", "../_base_/visionattn.py"]

model = dict(
    type="visionattn.ELAYOLOX",
    data_preprocessor=dict(batch_augments=None),
    neck=dict(type="visionattn.ELAYOLOXPAFPN", version="t"),
    bbox_head=dict(num_classes=20),
)

data_root = "data/VOCdevkit/"
img_scale = (640, 640)
# half of the pictures are mosaics, half of those mixed with another
train_pipeline = [
    dict(type="Mosaic", img_scale=img_scale, pad_val=114.0, prob=0.5),
    dict(type="MixUp", img_scale=img_scale, ratio_range=(0.8, 1.6), pad_val=114.0),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Resize", scale=img_scale, keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=img_scale, keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        pipeline=train_pipeline,
        dataset=dict(
            type="VOCDataset",
            data_root=data_root,
            ann_file="VOC2007/ImageSets/Main/trainval.txt",
            data_prefix=dict(_delete_=True, sub_data_root="VOC2007/"),
        ),
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="VOCDataset",
        data_root=data_root,
        ann_file="VOC2007/ImageSets/Main/test.txt",
        data_prefix=dict(_delete_=True, sub_data_root="VOC2007/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="VOCMetric", metric="mAP", eval_mode="area")
test_evaluator = val_evaluator

max_epochs = 72
num_last_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=0.01225, momentum=0.937, weight_decay=5e-4))
param_scheduler = [
    dict(type="mmdet.QuadraticWarmupLR", by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0006125,
        begin=3,
        T_max=max_epochs - num_last_epochs,
        end=max_epochs - num_last_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(type="ConstantLR", by_epoch=True, factor=1, begin=max_epochs - num_last_epochs, end=max_epochs),
]
custom_hooks = [
    dict(type="YOLOXModeSwitchHook", num_last_epochs=num_last_epochs, priority=48),
    dict(type="SyncNormHook", priority=48),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0001, update_buffers=True, priority=49),
]
auto_scale_lr = dict(base_batch_size=16)

# YOLOF with ELA in its encoder, by the authors' settings: 16 images a step, learning rate 0.03
_base_ = ["mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py", "../_base_/visionattn.py"]

model = dict(neck=dict(type="visionattn.ELADilatedEncoder", version="t"))
optim_wrapper = dict(optimizer=dict(lr=0.03))
train_dataloader = dict(batch_size=2, num_workers=2)
auto_scale_lr = dict(base_batch_size=16)

# crops of 512 x 512, two a GPU on eight GPUs
_base_ = "mmseg::_base_/datasets/ade20k.py"
train_dataloader = dict(batch_size=2)

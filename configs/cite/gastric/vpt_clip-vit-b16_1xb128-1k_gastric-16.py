_base_ = "vpt_clip-vit-b16_1xb128-1k_gastric.py"

train_dataloader = dict(dataset=dict(ann_file="gastric_cls3_ann/train_16_0.2.txt"))

_base_ = "linear_clip-vit-b16_1xb128-1k_gastric.py"

model = dict(backbone=dict(frozen=False))
optim_wrapper = dict(optimizer=dict(lr=1e-5))

_base_ = "linear_clip-vit-b16_1xb128-1k_gastric.py"

model = dict(backbone=dict(lora=dict(r=8, lora_alpha=16)))

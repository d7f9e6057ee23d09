_base_ = "linear_clip-vit-b16_1xb128-1k_gastric_tiny.py"

model = dict(backbone=dict(lora=dict(r=4, lora_alpha=8)))

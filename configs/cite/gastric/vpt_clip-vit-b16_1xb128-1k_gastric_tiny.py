_base_ = "linear_clip-vit-b16_1xb128-1k_gastric_tiny.py"

model = dict(backbone=dict(prompt_length=2, prompt_pos="prepend", prompt_init="normal"))

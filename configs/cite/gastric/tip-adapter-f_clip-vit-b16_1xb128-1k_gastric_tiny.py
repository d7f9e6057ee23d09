_base_ = "tip-adapter_clip-vit-b16_gastric_tiny.py"

model = dict(head=dict(fine_tune=True))
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))

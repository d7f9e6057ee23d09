_base_ = "clip-adapter_clip-vit-b16_1xb128-1k_gastric_tiny.py"

model = dict(neck=None, head=dict(type="CoOpHead", num_context=4))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=2e-3))

_base_ = "clip-adapter_clip-vit-b16_1xb128-1k_gastric_tiny.py"

model = dict(neck=None, head=dict(type="TipAdapterHead", alpha=1.0, beta=5.5))
custom_hooks = [*_base_.custom_hooks, dict(type="TipAdapterHook")]

# Tip-Adapter (Zhang et al. 2022, arXiv:2111.03930): training fills a cache and ends. alpha and beta
# are the paper's start values; its authors search both on validation images.
_base_ = "clip-adapter_clip-vit-b16_1xb128-1k_gastric.py"

model = dict(neck=None, head=dict(type="TipAdapterHead", alpha=1.0, beta=5.5))
custom_hooks = [*_base_.custom_hooks, dict(type="TipAdapterHook")]

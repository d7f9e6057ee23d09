# Tip-Adapter-F (Zhang et al. 2022, arXiv:2111.03930): the keys of the cache are trained.
_base_ = "tip-adapter_clip-vit-b16_gastric.py"

model = dict(head=dict(fine_tune=True))
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))

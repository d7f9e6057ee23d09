# CoOp (Zhou et al. 2022, arXiv:2109.01134): 16 context tokens for all classes, SGD at 0.002.
_base_ = "clip-adapter_clip-vit-b16_1xb128-1k_gastric.py"

model = dict(neck=None, head=dict(type="CoOpHead", num_context=16))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=2e-3))

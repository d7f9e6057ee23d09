# Published: SGD without momentum, 20 iterations at 0.005 of the cosine's rate, 1000 in all.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3))
param_scheduler = [
    # end=21: what ConstantLR scales is set back at `end - 1`.
    dict(type="ConstantLR", factor=0.005, by_epoch=False, begin=0, end=21),
    dict(type="CosineAnnealingLR", T_max=1000, eta_min=0, by_epoch=False, begin=0, end=1000),
]
train_cfg = dict(by_epoch=False, max_iters=1000, val_interval=1000)
val_cfg = dict()
test_cfg = dict()

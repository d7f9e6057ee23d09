# As published: 1000 iterations of SGD without momentum, the first 20 at 0.005 times the cosine's
# learning rate.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3))
param_scheduler = [
    # end=21, because ConstantLR restores the rate at `end - 1`: with 20, iteration 19 would have
    # 200 times the published rate.
    dict(type="ConstantLR", factor=0.005, by_epoch=False, begin=0, end=21),
    dict(type="CosineAnnealingLR", T_max=1000, eta_min=0, by_epoch=False, begin=0, end=1000),
]
train_cfg = dict(by_epoch=False, max_iters=1000, val_interval=1000)
val_cfg = dict()
test_cfg = dict()

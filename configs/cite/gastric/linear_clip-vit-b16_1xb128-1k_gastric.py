_base_ = ["_base_/runtime.py", "_base_/gastric.py", "_base_/schedule_1k.py"]

model = dict(
    backbone=dict(
        type="PromptedEncoder",
        encoder="open_clip:ViT-B-16-quickgelu",
        checkpoint="checkpoints/ViT-B-16.pt",
    ),
    head=dict(type="LinearClsHead", num_classes=3, in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=1e-2))

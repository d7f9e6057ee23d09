_base_ = "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric_tiny.py"

# Architecture of Prov-GigaPath's tile encoder (SwiGLU, layer scale, patches of 16 px), but small
# and with random weights.
model = dict(
    backbone=dict(
        _delete_=True,
        type="PromptedEncoder",
        encoder=dict(
            library="timm",
            architecture="vit_giant_patch14_dinov2",
            arguments=dict(
                img_size=224,
                patch_size=16,
                embed_dim=48,
                depth=2,
                num_heads=4,
                init_values=1e-5,
                mlp_ratio=5.33334,
            ),
        ),
        prompt_length=1,
        prompt_pos="prepend",
        prompt_init="token",
        precision="bf16",
        gradient_checkpointing=True,
    ),
    neck=dict(in_features=48),
)

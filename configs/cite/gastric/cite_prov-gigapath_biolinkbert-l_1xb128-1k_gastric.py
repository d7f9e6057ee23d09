_base_ = "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric.py"

# Tile encoder of Prov-GigaPath: pytorch_model.bin from
# https://huggingface.co/prov-gigapath/prov-gigapath, after accepting the terms there.
model = dict(
    backbone=dict(
        _delete_=True,
        type="PromptedEncoder",
        encoder="prov-gigapath@checkpoints/prov-gigapath",
        prompt_length=1,
        prompt_pos="prepend",
        prompt_init="token",
        # To save memory: the encoder has 1.1 billion frozen parameters, and the gradient of the
        # prompts passes through all of its 40 blocks.
        precision="bf16",
        gradient_checkpointing=True,
        save_frozen=False,
    ),
    neck=dict(in_features=1536),
)

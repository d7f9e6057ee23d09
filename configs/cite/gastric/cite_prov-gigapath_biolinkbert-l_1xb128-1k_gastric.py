_base_ = "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric.py"

# The tile encoder of Prov-GigaPath: pytorch_model.bin of
# https://huggingface.co/prov-gigapath/prov-gigapath, whose terms are to be accepted there.
model = dict(
    backbone=dict(
        _delete_=True,
        type="PromptedEncoder",
        encoder="prov-gigapath@checkpoints/prov-gigapath",
        prompt_length=1,
        prompt_pos="prepend",
        prompt_init="token",
        # 1.1 billion frozen parameters, through 40 blocks of which the prompt's gradient goes.
        precision="bf16",
        gradient_checkpointing=True,
        save_frozen=False,
    ),
    neck=dict(in_features=1536),
)

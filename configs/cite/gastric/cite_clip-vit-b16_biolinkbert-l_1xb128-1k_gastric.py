_base_ = ["_base_/runtime.py", "_base_/gastric.py", "_base_/schedule_1k.py"]

model = dict(
    backbone=dict(
        type="PromptedEncoder",
        encoder="open_clip:ViT-B-16-quickgelu",
        checkpoint="checkpoints/ViT-B-16.pt",
        prompt_length=1,
        prompt_pos="prepend",
        prompt_init="token",
    ),
    neck=dict(type="ProjectionNeck", in_features=512, out_features=1024, init="normal_identity"),
    head=dict(
        type="TextEmbeddingHead",
        texts=[
            "Well differentiated tubular adenocarcinoma",
            "Moderately differentiated tubular adenocarcinoma",
            "Poorly differentiated adenocarcinoma",
        ],
        temperature=4.6052,
        text_encoder=dict(type="bert", model="michiyasunaga/BioLinkBERT-large"),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.03))
train_dataloader = dict(sampler=dict(type="PatchBalancedSampler"))

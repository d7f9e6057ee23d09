# CLIP-Adapter (Gao et al. 2021, arXiv:2110.04544). The learning rate is the paper's; the optimizer
# is our choice.
_base_ = [
    "_base_/runtime.py",
    "_base_/gastric.py",
    "_base_/schedule_1k.py",
]

model = dict(
    backbone=dict(
        type="PromptedEncoder",
        encoder="open_clip:ViT-B-16-quickgelu",
        checkpoint="checkpoints/ViT-B-16.pt",
    ),
    neck=dict(type="AdapterNeck", width=512),
    head=dict(
        type="TextEmbeddingHead",
        texts=[
            "Well differentiated tubular adenocarcinoma",
            "Moderately differentiated tubular adenocarcinoma",
            "Poorly differentiated adenocarcinoma",
        ],
        text_encoder=dict(
            type="encoder", encoder="open_clip:ViT-B-16-quickgelu@checkpoints/ViT-B-16.pt"
        ),
    ),
)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-5))

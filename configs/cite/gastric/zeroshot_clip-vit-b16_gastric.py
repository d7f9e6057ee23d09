# There is nothing to train. Run: mim test mmcls <this file> --checkpoint none
_base_ = ["_base_/runtime.py", "_base_/gastric.py"]

model = dict(
    backbone=dict(
        type="PromptedEncoder",
        encoder="open_clip:ViT-B-16-quickgelu",
        checkpoint="checkpoints/ViT-B-16.pt",
    ),
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
train_dataloader = val_dataloader = val_evaluator = None
test_cfg = dict()

"""Questions about whole slides: tile features of Prov-GigaPath instead of pixels, 3 epochs.

NPROC_PER_NODE=8 xtuner-add train pallava_slide_questions.py --deepspeed deepspeed_zero2

A row of conversations.jsonl names its slide, {"slide": "case1", ...}, whose tile features lie in
features_folder/case1.h5. LoRA and connector start from PA-LLaVA's stage 2, the projection of the
tile features from random weights. 8 GPUs x batch 4 x accumulation 4 = 128.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.pallava_llama3_8b import *

from pallava.engine.slide_questions import EvaluateSlideHook, SlideQuestionDataset
from pallava.modeling.slide_tokens import SlideTokenEncoder

# Model: 1 + 14 x 14 tokens per slide for the language model, for any number of tiles
in_features = 1536
# Features of other encoders or tiles are refused; slides are embedded so for answers.
tiles = dict(tile_encoder="prov-gigapath", patch_px=256, mpp=0.5)
visual_encoder = dict(
    type=SlideTokenEncoder,
    **tiles,
    in_features=in_features,
    hidden_size=768,  # the width of PLIP, so that the connector of stage 2 fits
    num_attention_heads=12,
    map_size=14,
)
model.update(
    visual_encoder=visual_encoder,
    freeze_visual_encoder=False,
    pretrained_pth="checkpoints/pallava_instruction_tuning.pth",
)
image_processor = None

# Data
train_dataloader.update(
    batch_size=4,
    num_workers=4,  # a bag of 100,000 tiles takes 0.3 GB
)
train_dataloader["dataset"] = dict(
    type=SlideQuestionDataset,
    data_path="data/slide_conversations.jsonl",
    features_folder="data/features/gigapath",
    in_features=in_features,
    tokenizer=tokenizer,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=2048 - 197,
    **tiles,
)
train_dataloader["sampler"].update(per_device_batch_size=4)

# Schedule
optim_wrapper.update(accumulative_counts=4)
optim_wrapper["optimizer"].update(lr=2e-4, lr_mult=dict(projector=0.5))
param_scheduler[0].update(end=warmup_ratio * 3)
param_scheduler[1].update(eta_min=1e-6, begin=warmup_ratio * 3, end=3)
train_cfg.update(max_epochs=3)

# Runtime
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateSlideHook,
        tokenizer=tokenizer,
        in_features=in_features,
        every_n_iters=1000,
        evaluation_inputs=["Describe the slide."],
        evaluation_slides="data/evaluation.h5",
        prompt_template=prompt_template,
    ),
]

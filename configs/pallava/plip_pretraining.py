"""PLIP pretraining, full size: CLIP ViT-B/16 and BERT-base on image-caption pairs.

    xtuner-add train configs/pallava/plip_pretraining.py \
        --cfg-options train_dataloader.dataset.pairs_file=pairs.jsonl \
                      train_dataloader.dataset.image_folder=images

`--cfg-options` overrides entries of `model`, `train_dataloader`, ...; the variables at the top can
only be edited, since overriding them from the command line does not change the entries that use
them. If memory is short, set `model.gradient_checkpointing=True`. `model.gather_negatives=True`
draws hard negatives from all devices.
"""

from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook
from pallava.engine.plip_pretraining import (
    AlphaRampHook,
    MatrixDecayAdamW,
    PairTrainLoop,
    PLIPPairDataset,
    PLIPPretraining,
    SaveEncoderHook,
    collate_pairs,
)
from pallava.engine.runner import AdaptedRunner

#######################################################################
#                              Settings                               #
#######################################################################
data_path = "data/plip/pairs.jsonl"
image_folder = "data/plip/images"
clip_name_or_path = "openai/clip-vit-base-patch16"
bert_name_or_path = "google-bert/bert-base-uncased"
image_size = 224

# ALBEF, arXiv:2107.07651, "implementation details": 512 pairs a step on 8 devices, 30 epochs,
# AdamW with weight decay 0.02, warm-up to 1e-4 in 1,000 steps, cosine to 1e-5, momentum 0.995,
# soft targets 0.4 reached after the first epoch. Queue and text length are those of BLIP's
# pretrain.yaml (github.com/salesforce/BLIP), which PLIP took over.
batch_size = 64
dataloader_num_workers = 8
max_epochs = 30
lr = 1e-4
min_lr = 1e-5
betas = (0.9, 0.999)
weight_decay = 0.02
warmup_epochs = 0.3  # about 1,000 steps, for 1.6 million pairs and 512 pairs per step
max_norm = 1.0

#######################################################################
#                                Model                                #
#######################################################################
model = dict(
    type=PLIPPretraining,
    visual_encoder=clip_name_or_path,
    text_encoder=bert_name_or_path,
    tokenizer=None,  # the tokenizer of the text encoder
    max_length=30,
    embed_dim=256,
    queue_size=57600,
    momentum=0.995,
    alpha=0.4,
    temperature=0.07,
    positives="same_caption_id",  # the original uses "same_sample", and "negatives" below
    empty_slots="ignored",
    gather_negatives=False,
)

#######################################################################
#                                Data                                 #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,  # all processes need batches of equal size
    dataset=dict(
        type=PLIPPairDataset,
        pairs_file=data_path,
        image_folder=image_folder,
        image_size=image_size,
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate_pairs),
)

#######################################################################
#                        Optimizer and schedule                       #
#######################################################################
optim_wrapper = dict(
    type=AmpOptimWrapper,
    dtype="bfloat16",
    optimizer=dict(type=MatrixDecayAdamW, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=1,
)
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=0.1,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=min_lr,
        by_epoch=True,
        begin=warmup_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=PairTrainLoop, max_epochs=max_epochs)

#######################################################################
#                               Runtime                               #
#######################################################################
runner_type = AdaptedRunner  # adapts precision and communication to machines without CUDA
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=True, interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=AlphaRampHook, ramp_epochs=1.0),
    dict(type=SaveEncoderHook),
    dict(type=SkippedSamplesHook),
]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = None
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=True)

"""Base of both phases of LLaVA-1.5 with Vicuna-13B and a pathology CLIP.

Recipe: training commands of PathGen-1.6M, https://github.com/PathGen-1-6M/PathGen-1.6M, which are
those of LLaVA-1.5. The connector is LLaVA's `mlp2x_gelu`; features come from the penultimate layer.
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
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import llava_image_only_map_fn, llava_map_fn, template_map_fn_factory
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook
from pallava.engine.runner import AdaptedRunner
from pallava.engine.single_images import SingleImageDataset

# Model
llm_name_or_path = "lmsys/vicuna-13b-v1.5"
visual_encoder = "checkpoints/pathgen_clip"
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm_name_or_path,
    padding_side="right",
)
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=visual_encoder
)
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    visual_select_layer=-2,
    projector_depth=2,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        torch_dtype="auto",
    ),
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=visual_encoder
    ),
)

# Data: sequences of 2048 tokens, 24 x 24 of them for an image of 336 px in patches of 14 px
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    pin_memory=True,
    dataset=dict(
        type=SingleImageDataset,
        data_path="data/pathgen/captions.jsonl",
        image_folder="data/pathgen/images",
        tokenizer=tokenizer,
        image_processor=image_processor,
        dataset_map_fn=llava_image_only_map_fn,
        template_map_fn=None,
        max_length=2048 - 24 * 24,
        pad_image_to_square=False,
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)

# Schedule: one epoch; each phase sets its learning rate
warmup_ratio = 0.03
optim_wrapper = dict(
    type=AmpOptimWrapper,
    dtype="bfloat16",
    optimizer=dict(type=AdamW, lr=1e-3, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=1,
)
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=warmup_ratio,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=True,
        begin=warmup_ratio,
        end=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=1)

# Runtime for CUDA; the runner adapts precision and communication to other machines
runner_type = AdaptedRunner
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=SkippedSamplesHook),
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=24000, max_keep_ckpts=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
log_level = "INFO"
log_processor = dict(by_epoch=False)
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)

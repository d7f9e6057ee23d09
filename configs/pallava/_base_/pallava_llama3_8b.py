"""Base of both stages of PA-LLaVA with Llama-3-8B-Instruct.

Recipe: the published configs and README (doi:10.1109/BIBM62325.2024.10821785).
"""

from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from mmengine.visualization import TensorboardVisBackend, Visualizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.utils import PROMPT_TEMPLATE

from pallava.dataset import LLaVADataset
from pallava.default_collate_fn import default_collate_fn
from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook
from pallava.engine.optim import GroupedAdamW
from pallava.engine.runner import AdaptedRunner
from pallava.engine.samplers import SubImageGroupedSampler
from pallava.evaluate_chat_hook import EvaluateChatHook
from pallava.model import LLaVAModel

# Paths: everything that a user must set. A config that inherits this one must override them where
# they are used, as in `train_dataloader["dataset"].update(data_path=...)`, because it inherits the
# values below and not references to these names.
llm_name_or_path = "meta-llama/Meta-Llama-3-8B-Instruct"
visual_encoder = "checkpoints/plip"
data_path = "data/conversations.jsonl"
image_folder = "data/images"
evaluation_image = "data/evaluation.png"

# Model
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
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        torch_dtype="auto",
    ),
    llm_lora=dict(
        type=LoraConfig,
        r=128,
        lora_alpha=256,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    ),
    visual_encoder=visual_encoder,
    num_hidden_layers=6,
    cross_attention_freq=1,
)

# Data: sequences of 2048 tokens, of which the image takes 196
prompt_template = PROMPT_TEMPLATE.llama3_chat
train_dataloader = dict(
    batch_size=6,
    num_workers=16,
    persistent_workers=True,
    dataset=dict(
        type=LLaVADataset,
        data_path=data_path,
        image_folder=image_folder,
        tokenizer=tokenizer,
        image_processor=image_processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        max_length=2048 - 196,
        anyres_image=True,
    ),
    sampler=dict(type=SubImageGroupedSampler, per_device_batch_size=6),
    collate_fn=dict(type=default_collate_fn),
)

# Schedule: each stage sets epochs and learning rates
warmup_ratio = 0.03
optim_wrapper = dict(
    type=AmpOptimWrapper,
    dtype="bfloat16",
    optimizer=dict(type=GroupedAdamW, lr=1e-4, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=6,
)
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=warmup_ratio * 9,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=True,
        begin=warmup_ratio * 9,
        end=9,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=9)

# Runtime for CUDA; the runner adapts precision and communication to other machines
runner_type = AdaptedRunner
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        image_processor=image_processor,
        every_n_iters=1000,
        evaluation_inputs=["Describe the image."],
        evaluation_images=evaluation_image,
        prompt_template=prompt_template,
    ),
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=2000, max_keep_ckpts=20),
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

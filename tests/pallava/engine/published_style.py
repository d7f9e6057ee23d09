"""A stage-2 config that passes what the published ones pass: every argument, type and spelling."""

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
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.utils import PROMPT_TEMPLATE

from pallava.dataset import LLaVADataset
from pallava.default_collate_fn import default_collate_fn
from pallava.evaluate_chat_hook import EvaluateChatHook
from pallava.model import LLaVAModel

llm = "data/tiny/llama"
prompt_template = PROMPT_TEMPLATE.llama3_chat
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm,
    trust_remote_code=True,
    padding_side="right",
)
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained,
    pretrained_model_name_or_path="data/tiny/plip",
    trust_remote_code=True,
)
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm,
        trust_remote_code=True,
    ),
    llm_lora=dict(
        type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    ),
    visual_encoder="data/tiny/plip",
    projector_type="qformer_mlp",
    cross_attention_freq=1,
    num_hidden_layers=2,
    pretrained_pth="released.pth",
)
train_dataloader = dict(
    batch_size=6,
    num_workers=2,
    dataset=dict(
        type=LLaVADataset,
        offline_processed_text_folder="data/tiny/text",
        image_folder="data/tiny/images",
        tokenizer=tokenizer,
        image_processor=image_processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        max_length=2048 - 196,
        pad_image_to_square=False,
        anyres_image=True,
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    paramwise_cfg=dict(custom_keys={"projector": dict(lr_mult=0.5), "llm": dict(lr_mult=1.0)}),
    accumulative_counts=2,
    loss_scale="dynamic",
    dtype="float16",
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        eta_min=1e-6,
        by_epoch=True,
        begin=1,
        end=2,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=2)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        image_processor=image_processor,
        every_n_iters=10,
        max_new_tokens=4,
        evaluation_inputs=["Describe the image.", "Is it red?"],
        evaluation_images="data/tiny/images/1.png",
        system="You are a pathologist.",
        prompt_template=prompt_template,
        anyres_image=True,
        projector_type="qformer_mlp",
    ),
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=10, max_keep_ckpts=20),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
log_level = "INFO"
load_from = None
resume = True
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)

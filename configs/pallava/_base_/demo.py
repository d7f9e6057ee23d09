"""Base of both stages of `xtuner-add demo`, which generates the data, the LLM and the PLIP."""

from mmengine.config import read_base
from xtuner.engine.hooks import DatasetInfoHook

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook

with read_base():
    from .tiny import *

tokenizer.update(pretrained_model_name_or_path="llm")
image_processor.update(pretrained_model_name_or_path="plip/plip_encoder")
model["llm"].update(pretrained_model_name_or_path="llm")
model["llm_lora"].update(r=16, lora_alpha=32, lora_dropout=0.0)
model.update(
    visual_encoder="plip/plip_encoder",
    connector=dict(hidden_dropout_prob=0.0),  # the training is too short for dropout to help
    use_activation_checkpointing=False,
)
train_dataloader.update(batch_size=24)
train_dataloader["sampler"].update(per_device_batch_size=24)
train_dataloader["dataset"].update(
    image_folder="data", tokenizer=tokenizer, image_processor=image_processor
)
optim_wrapper["optimizer"].update(lr=1.5e-3)
warmup_iters = 15
param_scheduler[0].update(start_factor=0.01, by_epoch=False, end=warmup_iters)
param_scheduler[0].pop("convert_to_iter_based")
param_scheduler[1].update(by_epoch=False, begin=warmup_iters, eta_min=0.0)
param_scheduler[1].pop("convert_to_iter_based")
train_cfg.pop("max_epochs")
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
]
default_hooks["checkpoint"].update(interval=50, max_keep_ckpts=2)
default_hooks["logger"].update(interval=5)

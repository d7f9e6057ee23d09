"""Questions about the regions of `benchmarks/slide_questions.py`; runs in its folder."""

from mmengine.config import read_base
from xtuner.engine.hooks import DatasetInfoHook

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook

with read_base():
    from .pallava_slide_questions_tiny import *

tokenizer.update(pretrained_model_name_or_path="llm")
model["llm"].update(pretrained_model_name_or_path="llm")
model["llm_lora"].update(r=16, lora_alpha=32, lora_dropout=0.0)
model["visual_encoder"].update(hidden_size=96, map_size=8)
model.update(
    num_hidden_layers=3,
    connector=dict(hidden_dropout_prob=0.0),  # the training is too short for dropout to help
    use_activation_checkpointing=False,
)
train_dataloader.update(batch_size=16)
train_dataloader["sampler"].update(per_device_batch_size=16)
train_dataloader["dataset"].update(
    data_path="data/conversations.jsonl",
    features_folder="data/features",
    tokenizer=tokenizer,
    dataset_map_fn=None,
)
optim_wrapper["optimizer"].update(lr=1.5e-3, lr_mult=dict())
warmup_iters, max_iters = 2, 5000
param_scheduler[0].update(start_factor=0.01, by_epoch=False, end=warmup_iters)
param_scheduler[0].pop("convert_to_iter_based")
param_scheduler[1].update(by_epoch=False, begin=warmup_iters, end=max_iters, eta_min=0.0)
param_scheduler[1].pop("convert_to_iter_based")
train_cfg.pop("max_epochs")
train_cfg.update(max_iters=max_iters)
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
]
default_hooks["checkpoint"].update(interval=500, max_keep_ckpts=1)
default_hooks["logger"].update(interval=10)

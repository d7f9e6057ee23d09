"""Questions about slides, minutes on a CPU: xtuner-add train pallava_slide_questions_tiny.py

Expects under data/tiny: `llama` (a tiny Llama and its tokenizer), `slide_conversations.jsonl` and
`features`, 32 wide.
"""

from mmengine.config import read_base
from xtuner.engine.hooks import DatasetInfoHook

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook

with read_base():
    from .pallava_slide_questions import *

in_features = 32
tiles = dict(tile_encoder="", patch_px=0, mpp=0.0)  # any features of this width
tokenizer.update(pretrained_model_name_or_path="data/tiny/llama")
model["llm"].update(pretrained_model_name_or_path="data/tiny/llama")
model["llm_lora"].update(r=8, lora_alpha=16)
model["visual_encoder"].update(
    in_features=in_features, hidden_size=64, num_attention_heads=4, map_size=4, **tiles
)
model.update(num_hidden_layers=2, pretrained_pth=None)
train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
train_dataloader["sampler"].update(per_device_batch_size=4)
train_dataloader["dataset"].update(
    data_path="data/tiny/slide_conversations.jsonl",
    features_folder="data/tiny/features",
    in_features=in_features,
    tokenizer=tokenizer,
    **tiles,
)
optim_wrapper.update(accumulative_counts=1)
optim_wrapper["optimizer"].update(lr=2e-3, lr_mult=dict(projector=0.5))
param_scheduler[0].update(end=0.5)  # at least two iterations, the minimum for a warm-up
param_scheduler[1].update(begin=0.5, end=4)
train_cfg.update(max_epochs=4)
# Without the chat hook: there is nothing to ask a model this small.
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
]
default_hooks["checkpoint"].update(interval=20, max_keep_ckpts=3)
default_hooks["logger"].update(interval=1)
visualizer = None

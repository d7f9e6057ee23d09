"""Phase 1 in minutes on a CPU: xtuner-add train pathgen_llava_pretrain_tiny

Expects under data/tiny: `llama` (a tiny Llama and its tokenizer), `clip` (a vision encoder with its
processor), `captions.jsonl` and `images`.
"""

from mmengine.config import read_base
from xtuner.engine.hooks import DatasetInfoHook

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook

with read_base():
    from ._base_.pathgen_llava_13b import *

tokenizer.update(pretrained_model_name_or_path="data/tiny/llama")
image_processor.update(pretrained_model_name_or_path="data/tiny/clip")
model["llm"].update(pretrained_model_name_or_path="data/tiny/llama")
model["visual_encoder"].update(pretrained_model_name_or_path="data/tiny/clip")
train_dataloader.update(batch_size=4, num_workers=0)
train_dataloader["dataset"].update(
    data_path="data/tiny/captions.jsonl",
    image_folder="data/tiny/images",
    tokenizer=tokenizer,
    image_processor=image_processor,
)
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=SkippedSamplesHook),
]
param_scheduler[0].update(end=0.5)  # at least two iterations, the minimum for a warm-up
param_scheduler[1].update(begin=0.5, end=2)
train_cfg.update(max_epochs=2)
default_hooks["checkpoint"].update(interval=10, max_keep_ckpts=3)
visualizer = None

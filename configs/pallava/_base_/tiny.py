"""Overrides that shrink PA-LLaVA to train within minutes on a CPU, by the same code.

Expects under data/tiny: `llama` (a tiny Llama and its tokenizer), `plip` (an encoder folder),
`conversations.jsonl` and `images`.
"""

from mmengine.config import read_base
from xtuner.engine.hooks import DatasetInfoHook

from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook

with read_base():
    from .pallava_llama3_8b import *

tokenizer.update(pretrained_model_name_or_path="data/tiny/llama")
image_processor.update(pretrained_model_name_or_path="data/tiny/plip")
model["llm"].update(pretrained_model_name_or_path="data/tiny/llama")
model["llm_lora"].update(r=8, lora_alpha=16)
model.update(visual_encoder="data/tiny/plip", num_hidden_layers=2)
train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
train_dataloader["sampler"].update(per_device_batch_size=4)
train_dataloader["dataset"].update(
    data_path="data/tiny/conversations.jsonl",
    image_folder="data/tiny/images",
    tokenizer=tokenizer,
    image_processor=image_processor,
)
optim_wrapper.update(accumulative_counts=1)
optim_wrapper["optimizer"].update(lr=1e-3)
# Without the chat hook, since the answers of a model this small are meaningless.
custom_hooks = [
    dict(type=IterationSeedHook),
    dict(type=SkippedSamplesHook),
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
]
default_hooks["checkpoint"].update(interval=20, max_keep_ckpts=3)
default_hooks["logger"].update(interval=1)
visualizer = None

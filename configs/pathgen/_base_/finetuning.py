"""Overrides of the second phase, which trains the whole language model on conversations."""

from mmengine.config import read_base

with read_base():
    from .pathgen_llava_13b import *

prompt_template = PROMPT_TEMPLATE.vicuna
model.update(freeze_llm=False, pretrained_pth="work_dirs/pathgen_llava_pretrain/iter_24000.pth")
train_dataloader.update(batch_size=16)
train_dataloader["sampler"] = dict(  # replaced, since update() would keep `shuffle`
    type=LengthGroupedSampler, length_property="modality_length", per_device_batch_size=16
)
train_dataloader["dataset"].update(
    data_path="data/pathgen/conversations.jsonl",
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    pad_image_to_square=True,
)
optim_wrapper["optimizer"].update(lr=2e-5)
default_hooks["checkpoint"].update(interval=50000)

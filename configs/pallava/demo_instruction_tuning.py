"""Stage 2 of `xtuner-add demo`: questions on slides; paths are relative to the demo's folder."""

from mmengine.config import read_base

with read_base():
    from ._base_.demo import *

model.update(pretrained_pth="scale_invariant/domain_alignment/iter_200.pth")
train_dataloader["dataset"].update(data_path="data/conversations.jsonl")
param_scheduler[1].update(end=300)
train_cfg.update(max_iters=300)

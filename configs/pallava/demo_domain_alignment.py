"""Stage 1 of `xtuner-add demo`: reports on slides; paths are relative to the demo's folder."""

from mmengine.config import read_base

with read_base():
    from ._base_.demo import *

train_dataloader["dataset"].update(data_path="data/captions.jsonl")
param_scheduler[1].update(end=200)
train_cfg.update(max_iters=200)

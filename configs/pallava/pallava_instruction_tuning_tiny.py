"""Stage 2 in minutes on a CPU: xtuner-add train pallava_instruction_tuning_tiny.py"""

from mmengine.config import read_base

with read_base():
    from ._base_.tiny import *

model.update(pretrained_pth="work_dirs/pallava_domain_alignment_tiny/iter_40.pth")
optim_wrapper["optimizer"].update(lr=2e-3, lr_mult=dict(projector=0.5))
param_scheduler[0].update(end=0.5)  # at least two iterations, the minimum for a warm-up
param_scheduler[1].update(eta_min=1e-6, begin=0.5, end=4)
train_cfg.update(max_epochs=4)

"""Stage 1 in minutes on a CPU: xtuner-add train pallava_domain_alignment_tiny.py"""

from mmengine.config import read_base

with read_base():
    from ._base_.tiny import *

param_scheduler[0].update(end=0.5)  # at least two iterations, the minimum for a warm-up
param_scheduler[1].update(begin=0.5, end=4)
train_cfg.update(max_epochs=4)

"""PA-LLaVA stage 2: continues stage 1 on questions, 12 epochs of PathVQA and PMC-VQA.

NPROC_PER_NODE=8 NNODES=2 NODE_RANK=0 ADDR=... PORT=12345 \
    xtuner-add train pallava_instruction_tuning.py --deepspeed deepspeed_zero2 --seed 1024

16 GPUs x batch 6 x accumulation 4 = 384. The learning rate of the connector is half that of LoRA.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.pallava_llama3_8b import *

model.update(pretrained_pth="work_dirs/pallava_domain_alignment/iter_8100.pth")
optim_wrapper.update(accumulative_counts=4)
optim_wrapper["optimizer"].update(lr=2e-4, lr_mult=dict(projector=0.5))
param_scheduler[0].update(end=warmup_ratio * 12)
param_scheduler[1].update(eta_min=1e-6, begin=warmup_ratio * 12, end=12)
train_cfg.update(max_epochs=12)

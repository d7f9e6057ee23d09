"""PA-LLaVA stage 2 on one GPU in 4 bits (QLoRA): 1 GPU x batch 4 x accumulation 96 = 384."""

from mmengine.config import read_base

with read_base():
    from .pallava_qlora_domain_alignment import *

    # isort: split
    # Last, because the schedule of stage 2 must replace that of stage 1.
    from .pallava_instruction_tuning import optim_wrapper, param_scheduler, train_cfg

# As many samples as 8100 iterations of 16 GPUs with batch 6.
model.update(pretrained_pth="work_dirs/pallava_qlora_domain_alignment/iter_194400.pth")
optim_wrapper.update(accumulative_counts=96)
default_hooks["checkpoint"].update(interval=9600)

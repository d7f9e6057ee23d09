"""PA-LLaVA stage 2 with MedGemma 27B text, continuing its stage 1."""

from mmengine.config import read_base

with read_base():
    from .pallava_medgemma_27b_domain_alignment import *

    # isort: split
    # Last, because the schedule of stage 2 must replace that of stage 1.
    from .pallava_instruction_tuning import optim_wrapper, param_scheduler, train_cfg

model.update(pretrained_pth="work_dirs/pallava_medgemma_27b_domain_alignment/iter_8100.pth")

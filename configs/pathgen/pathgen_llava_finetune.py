"""Phase 2 of PathGen's caption model: trains connector and LLM on detailed captions.

NPROC_PER_NODE=8 xtuner-add train pathgen_llava_finetune --deepspeed deepspeed_zero3 --seed 1024

Continues phase 1: set `model.pretrained_pth` to its last checkpoint.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.finetuning import *

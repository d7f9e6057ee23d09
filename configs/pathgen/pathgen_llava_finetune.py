"""Phase 2 of PathGen's caption model: connector and language model learn detailed captions.

NPROC_PER_NODE=8 xtuner-add train pathgen_llava_finetune --deepspeed deepspeed_zero3 --seed 1024

From phase 1. Set `model.pretrained_pth` to the checkpoint that phase 1 ended with.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.finetuning import *

"""Phase 1 of PathGen's caption model: trains the connector on image-caption pairs.

NPROC_PER_NODE=8 xtuner-add train pathgen_llava_pretrain --deepspeed deepspeed_zero2 --seed 1024

The prompt is only the image (LLaVA's `plain`). The base config lists all paths and settings.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.pathgen_llava_13b import *

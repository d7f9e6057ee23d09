"""PA-LLaVA stage 1: trains LoRA and connector on captions, 9 epochs of PCaption-0.5M.

NPROC_PER_NODE=8 NNODES=2 NODE_RANK=0 ADDR=... PORT=12345 \
    xtuner-add train pallava_domain_alignment.py --deepspeed deepspeed_zero2 --seed 1024

16 GPUs x batch 6 x accumulation 6 = 576. The base config lists all paths and settings.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.pallava_llama3_8b import *

"""PA-LLaVA stage 1 on one GPU: Llama-3-8B in 4 bits (QLoRA), with the published global batch.

1 GPU x batch 4 x accumulation 144 = 576. LoRA is merged into the original base in bf16, as
`xtuner-add export` does, not into the 4-bit weights.
"""

import torch
from mmengine.config import read_base
from transformers import BitsAndBytesConfig

with read_base():
    from .pallava_domain_alignment import *

model["llm"].update(
    torch_dtype=torch.bfloat16,
    quantization_config=dict(
        type=BitsAndBytesConfig,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
)
train_dataloader.update(batch_size=4, num_workers=4)
train_dataloader["sampler"].update(per_device_batch_size=4)
optim_wrapper.update(accumulative_counts=144)
default_hooks["checkpoint"].update(interval=14400)  # a multiple of the accumulation

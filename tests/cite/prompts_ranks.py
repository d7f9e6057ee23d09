"""One of two ranks of torchrun: a few data-parallel steps of a prompted encoder.

Run as: prompts_ranks.py CHECKPOINT ARRAYS ARCH_JSON OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from cite.encoders import build_encoder
from cite.prompted import PromptedEncoder

STEPS = 2


def main() -> None:
    checkpoint, arrays, arch, out = sys.argv[1:]
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(rank)  # the noise differs; DDP sends that of rank 0 around
    encoder = build_encoder(dict(library="open_clip", config=json.loads(arch)), checkpoint)
    module = PromptedEncoder(encoder, prompt_length=2, prompt_noise_std=0.01)
    model = DistributedDataParallel(module)
    with np.load(arrays) as golden:
        rows = slice(2 * rank, 2 * rank + 2)
        images, cotangent = (torch.from_numpy(golden[key][rows]) for key in ("x1", "gout"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    saved = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(images) * cotangent).sum().backward()
        saved.append(module.prompts.prompt.detach().clone())
        optimizer.step()
    saved.append(module.prompts.prompt.detach().clone())
    torch.save(saved, Path(out) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Lets DeepSpeed write one checkpoint folder for each ZeRO stage: `deepspeed_writer.py FOLDER`.

Started once per rank. Two parameter groups hold sizes that no number of ranks divides,
so that padding and splits inside a tensor occur. `expected.pt` keeps the fp32 master weights as
DeepSpeed's own accessor returns them in the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

STAGES = (1, 2, 3)
TAG = "iter_4.pth"


class Model(torch.nn.Module):
    """Frozen base, two trained parts, and an integer buffer, as PA-LLaVA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = torch.nn.Linear(9, 4, bias=False)
        self.frozen = torch.nn.Linear(3, 4).requires_grad_(False)
        self.projector = torch.nn.Linear(5, 3)
        self.projector.register_buffer("position_ids", torch.arange(6))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Any value that depends on every trained parameter."""
        return self.llm(batch).sum() + self.projector(batch[:, :5]).sum() + self.frozen.bias.sum()


def main(root: Path) -> None:
    from pallava.engine.runtime import prepare_host

    prepare_host()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    for stage in STAGES:
        torch.manual_seed(0)
        model = Model()
        groups = [
            {"params": list(model.projector.parameters())},
            {"params": list(model.llm.parameters()), "lr": 0.01},
        ]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(torch.randn(2, 9).to(torch.bfloat16)))
        engine.step()
        folder = root / f"zero{stage}_ranks{dist.get_world_size()}"
        # What MMEngine hands over as client_state.
        logs = {"train/loss": HistoryBuffer([1.0], [1]), "train/empty": HistoryBuffer()}
        history = {"message_hub": logs, "cfg": ConfigDict(seed=0)}
        engine.save_checkpoint(str(folder), tag=TAG, client_state=history, save_latest=True)
        masters = {
            name: safe_get_full_fp32_param(parameter).clone().view(-1)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if dist.get_rank() == 0:
            torch.save(masters, folder / "expected.pt")
        dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", "0")
    main(Path(sys.argv[1]))

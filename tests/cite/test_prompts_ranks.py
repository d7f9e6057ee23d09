"""Token initialisation is equal on all ranks, and that of one process with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cite.goldens import CLIP_ARCH, CLIP_WEIGHTS, FP32, GOLDEN, clip_encoder, read_arrays

SCRIPT = Path(__file__).with_name("prompts_ranks.py")


@pytest.mark.multiproc
def test_two_ranks_have_the_prompts_of_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [CLIP_WEIGHTS, GOLDEN / "backbone.npz", json.dumps(CLIP_ARCH), tmp_path]
    done = subprocess.run(
        [*command, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
    torch.manual_seed(0)
    # The same draws: an encoder is built before its prompts are.
    alone = clip_encoder(prompt_length=2, prompt_noise_std=0.01)
    golden = read_arrays("backbone.npz")
    optimizer = torch.optim.SGD([alone.prompts.prompt], lr=0.05)
    for expected in first[:-1]:
        optimizer.zero_grad()
        loss = (alone(golden["x1"]) * golden["gout"]).sum() / 2  # DDP takes the mean over ranks
        loss.backward()
        torch.testing.assert_close(alone.prompts.prompt.detach(), expected, **FP32)
        optimizer.step()
    torch.testing.assert_close(alone.prompts.prompt.detach(), first[-1], **FP32)

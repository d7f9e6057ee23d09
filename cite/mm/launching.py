"""What a run needs of its machine, asked by a config when it is read."""

from __future__ import annotations

import os
from typing import Any

_WRAPPER = {
    "type": "MMDistributedDataParallel",
    "broadcast_buffers": False,
    "find_unused_parameters": False,
}


def choose_backend() -> str:
    """Returns the communication between processes: NCCL with CUDA, gloo without."""
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


def choose_wrapper() -> dict[str, Any]:
    """Returns `model_wrapper_cfg` for data-parallel runs, on CPU as well.

    On CPU it opens the process group when a launcher such as torchrun started this process, because
    MMEngine would call CUDA even for gloo. Configs call it as
    `__import__('cite.mm.launching', fromlist=['_']).choose_wrapper()`: an import statement would
    make MMEngine read them in its other style.
    """
    import torch
    import torch.distributed as dist

    from pathcore.ranks import open_gloo_group

    if torch.cuda.is_available():
        return dict(_WRAPPER)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        open_gloo_group()
    # MMEngine passes device_ids=[LOCAL_RANK] of its own accord, which DDP refuses on CPU.
    return _WRAPPER | {"device_ids": None}

"""What a run needs of its machine, asked by a config when it is read."""

from __future__ import annotations

import atexit
import os
import sys
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

    if torch.cuda.is_available():
        return dict(_WRAPPER)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_close_group)
    # MMEngine passes device_ids=[LOCAL_RANK] of its own accord, which DDP refuses on CPU.
    return _WRAPPER | {"device_ids": None}


def _close_group() -> None:
    """Ends gloo's threads before Python ends: one that frees a tensor later aborts the process.

    After an error the other processes may wait in a collective for ever, and so would this.
    """
    import torch.distributed as dist

    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()

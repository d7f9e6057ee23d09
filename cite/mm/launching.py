"""Makes data-parallel training work on CPUs, although MMEngine assumes CUDA.

If a launcher such as torchrun started this process on a machine without CUDA, importing this module
opens the process group, because MMEngine would call CUDA even for gloo. Configs list the module in
`custom_imports`, the only part of a config that is executed before MMEngine opens the group.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS

from pathcore.ranks import open_gloo_group


@MODEL_WRAPPERS.register_module()
class AnyDeviceDataParallel(MMDistributedDataParallel):
    """MMEngine's data-parallel wrapper for GPUs and CPUs."""

    def __init__(self, module: torch.nn.Module, device_ids: list[int] | None, **kwargs: Any):
        # MMEngine passes device_ids=[LOCAL_RANK], which DDP rejects on a CPU.
        device_ids = device_ids if torch.cuda.is_available() else None
        super().__init__(module, device_ids=device_ids, **kwargs)


if (
    not torch.cuda.is_available()
    and {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    and not dist.is_initialized()
):
    open_gloo_group()

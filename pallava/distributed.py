"""Processes that work together, and tensors of all of them; a single process needs no group."""

from __future__ import annotations

import atexit
import sys
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def open_gloo_group(timeout: timedelta | None = None) -> None:
    """Opens the process group that a launcher's variables describe, and closes it at the end.

    Args:
        timeout: How long a process waits for the others; by default as long as torch thinks fit.
    """
    dist.init_process_group("gloo", timeout=timeout)
    atexit.register(_close_group)


def _close_group() -> None:
    """Closes the group while Python still runs: gloo's threads would abort a process that ends.

    A process that failed leaves it open, since others may not come to what it waits for.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Joins the tensors of all ranks, which have one shape, in rank order along the first axis.

    No gradient flows back. A single process gets its own back.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """As `all_gather`; the gradient of each part is the sum over the ranks that used it."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather as differentiable_all_gather

    return torch.cat(differentiable_all_gather(tensor.contiguous()))

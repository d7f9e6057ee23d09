"""Tensors of all ranks; in a single process every function gives back what it got."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Joins the tensors of all ranks, which have one shape, in rank order along the first axis.

    No gradient flows back.
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

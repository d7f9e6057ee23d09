"""Process groups of torch.distributed, for one process or those that a launcher started."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pathcore.device_claims import choose_device

Value = TypeVar("Value")

PATIENCE = timedelta(hours=6)
"""Timeout of collectives: the first process alone checks slides, which may take hours."""


def rank_and_world_size() -> tuple[int, int]:
    """Returns rank and world size; `(0, 1)` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def open_gloo_group(timeout: timedelta | None = None) -> None:
    """Joins the gloo process group of the launcher's environment variables; leaves it at exit.

    Args:
        timeout: Timeout of collectives; by default that of torch.
    """
    dist.init_process_group("gloo", timeout=timeout)
    atexit.register(_close_group)


def _close_group() -> None:
    """Leaves the group while Python still runs.

    gloo's threads abort the process if they free a tensor after the interpreter has ended. After an
    uncaught exception the group stays open, since other processes may be waiting in a collective
    and leaving would wait for them.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates tensors of the same shape from all ranks along the first axis, in rank order.

    The result has no gradient.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Like `all_gather`, but differentiable: gradients are summed over all ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor
    # Imported here because it initialises RPC, which a single process does not need.
    from torch.distributed.nn.functional import all_gather as differentiable_all_gather

    return torch.cat(differentiable_all_gather(tensor.contiguous()))


class Ranks:
    """Context manager that joins a process group and leaves it at the end.

    Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; without them, there is a single process.

    Args:
        device: `cpu` or `cuda`; by default a GPU if there is one.

    Attributes:
        rank: Rank of this process.
        world: Number of processes.
        device: Device of this process; processes of a machine use different GPUs.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        if self.device == torch.device("cuda") and self.world > 1:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            self.device = torch.device("cuda", local % torch.cuda.device_count())
        self._started = False

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which writes all files."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
            self._started = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            dist.destroy_process_group()
            self._started = False

    def first(self, work: Callable[[], Value]) -> Value:
        """Runs `work` in the first process and returns its result in all processes.

        Raises:
            ValueError: In all processes, if `work` raised `ValueError` or `OSError`. Otherwise the
                others would wait until the timeout.
        """
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except (ValueError, OSError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise ValueError(box[1])
        found: Value = box[0]
        return found

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes, in rank order."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def share_parameters(self, model: nn.Module) -> None:
        """Copies parameters and buffers of the first process to all others."""
        if self.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their sum over all processes.

        If no process has a gradient for a parameter, it remains None, so that the optimizer skips
        the parameter.
        """
        if self.world == 1:
            return
        parameters = list(parameters)
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(present)
        works = []
        for parameter, count in zip(parameters, present.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()

    def barrier(self) -> None:
        """Waits until all processes have reached this point."""
        if self.world > 1:
            dist.barrier()

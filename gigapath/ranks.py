"""The processes of a training: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Value = TypeVar("Value")

PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which alone checks slides and writes files."""


class Ranks:
    """This process among those of the training; a context manager.

    Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; without them the process is alone.

    Args:
        device: `cpu` or `cuda`; by default a GPU where there is one.

    Attributes:
        rank: Number of the process.
        world: How many there are.
        device: Where it computes: on GPUs each process has its own.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(kind)
        if kind == "cuda" and self.world > 1:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            self.device = torch.device("cuda", local % torch.cuda.device_count())
        self._started = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
            self._started = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._started:
            dist.destroy_process_group()
            self._started = False

    def first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, in all of them; the others wait.

        Raises:
            ValueError: The first process could not do it; says why.
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
        """The values of all processes, by number."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def share_parameters(self, model: nn.Module) -> None:
        """Gives all processes the first one's parameters and buffers."""
        if self.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their sum over the processes.

        A parameter without gradient in all of them keeps none, so that the optimiser leaves it.
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
        """Waits until all processes are here."""
        if self.world > 1:
            dist.barrier()

"""Places the encoder of a job over slides: device, reading processes, and a GPU per process.

Processes claim GPUs by file locks. Torch is imported at the first use of a device.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

    from pathcore.pool import PoolOptions

_held: list[int] = []
"""Descriptors of the locks, which must stay open: closing one would release the GPU."""


def claim(folder: Path, number: int) -> int:
    """Claims a GPU until this process ends; the operating system releases the claim.

    Args:
        folder: Folder of the job, shared by all its processes.
        number: Number of GPUs of this machine.

    Returns:
        The index of the GPU.

    Raises:
        RuntimeError: If all GPUs are claimed.
    """
    if fcntl is None:
        return 0
    locks = folder / ".job" / "devices"
    locks.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        # The host is part of the name because machines may share the folder.
        path = locks / f"{socket.gethostname()}-{index}"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _held.append(descriptor)
        return index
    raise RuntimeError(f"{number} GPUs, all taken by other workers: ask for fewer --workers")


@dataclass(frozen=True)
class Placement:
    """Settings of a job with an encoder that do not change its output.

    Attributes:
        device: Name of the device; by default a GPU if there is one.
        read_workers: Number of processes that read tiles ahead of the encoder, per slide; 0 uses a
            thread.
        own_gpu: Whether each process claims a separate GPU.
        tile_bar: Whether to show a progress bar over the tiles of each slide.
    """

    device: str | None = None
    read_workers: int = 0
    own_gpu: bool = False
    tile_bar: bool = False

    @property
    def pool(self) -> PoolOptions:
        """How a pool runs tasks that use the device."""
        on_gpu = choose_device(self.device).type == "cuda"
        return {"gpus_per_task": int(on_gpu), "can_fork": not on_gpu}

    def for_job(self, *, workers: int, engine: str, progress: bool) -> Placement:
        """Returns the placement with all its settings, chosen to suit the job.

        Args:
            workers: See `pathcore.pool.PoolOptions`.
            engine: See `pathcore.pool.PoolOptions`.
            progress: Whether the job shows progress bars.
        """
        device = str(choose_device(self.device))
        return replace(
            self,
            device=device,
            own_gpu=device == "cuda" and engine == "process",
            tile_bar=progress and workers == 1 and engine != "ray",
        )

    def worker_device(self, out: Path) -> torch.device:
        """Returns the device of this process, the same for all its tasks.

        Args:
            out: Folder of the job, shared by all its processes.

        Raises:
            RuntimeError: If there are more processes than GPUs.
        """
        return _worker_device(self.device, out if self.own_gpu else None)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the named device; by default the current GPU, or the CPU if there is none.

    Raises:
        ValueError: If torch does not know the name, or there is no such GPU.
    """
    import torch

    if not device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: expected cpu, cuda or cuda:INDEX") from error
    if chosen.type == "cuda":
        available = torch.cuda.is_available()
        count = torch.cuda.device_count() if available else 0
        if not available or (chosen.index is not None and chosen.index >= count):
            raise ValueError(
                f"device {str(device)!r}: torch {torch.__version__} finds {count or 'no'} GPUs on "
                "this machine; `xtuner-add doctor` shows what there is"
            )
    return chosen


@lru_cache
def _worker_device(device: str | None, claims: Path | None) -> torch.device:
    import torch

    chosen = choose_device(device)
    if claims is None or chosen.type != "cuda" or chosen.index is not None:
        return chosen
    return torch.device("cuda", claim(claims, torch.cuda.device_count()))

"""Assigns a separate GPU to each process of a job, by file locks. Does not import torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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

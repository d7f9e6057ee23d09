"""Gives each process of a job a GPU of its own. Imports no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_held: list[int] = []
"""Descriptors of locks that this process holds until it ends."""


def claim(folder: Path, number: int) -> int:
    """Claims a GPU until this process ends; the operating system releases the claim.

    Args:
        folder: The folder of the job, which all its processes see.
        number: Number of GPUs of this machine.

    Returns:
        The index of the GPU.

    Raises:
        RuntimeError: If all are claimed.
    """
    if fcntl is None:
        return 0
    locks = folder / ".job" / "devices"
    locks.mkdir(parents=True, exist_ok=True)
    for index in range(number):
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

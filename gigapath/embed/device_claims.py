"""Processes of a job share out the GPUs of a machine, one each. Knows no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_held: list[int] = []
"""Descriptors of the locks that this process holds as long as it lives."""


def claim(folder: Path, number: int) -> int:
    """Takes one of so many places for the life of this process; the system gives it back.

    Args:
        folder: Of the job, which all its processes see.
        number: Places on this machine.

    Returns:
        The number of the place, from 0.

    Raises:
        RuntimeError: All are taken.
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

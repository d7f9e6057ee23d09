"""What the workers of an embedding job keep: their device and their encoders."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path

import torch

from gigapath.slide_encoder import LongNetViT
from gigapath.slide_vectors import SlideEncoderSpec, open_slide_encoder
from gigapath.tile_inference import TileEncoder, TileEncoderSpec, choose_device

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_claims: list[int] = []
"""Descriptors of the locks that this process holds as long as it lives."""


@lru_cache
def worker_device(device: str | None, claims: Path | None) -> torch.device:
    """Returns the device of this process.

    Args:
        device: Its name; None for a GPU where there is one.
        claims: A job's folder in which the processes of a machine share out its GPUs, one each;
            None takes the first.

    Raises:
        RuntimeError: There are more processes than GPUs.
    """
    chosen = choose_device(device)
    if claims is None or chosen.type != "cuda" or chosen.index is not None or fcntl is None:
        return chosen
    return torch.device("cuda", claim(claims, torch.cuda.device_count()))


def claim(folder: Path, number: int) -> int:
    """Takes one of so many places for the life of this process; the system gives it back.

    Raises:
        RuntimeError: All are taken.
    """
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
        _claims.append(descriptor)
        return index
    raise RuntimeError(f"{number} GPUs, all taken by other workers: ask for fewer --workers")


@lru_cache(maxsize=1)
def load_tile_encoder(spec: TileEncoderSpec, device: torch.device) -> TileEncoder:
    """The tile encoder of this process."""
    return TileEncoder.open(spec, device=device)


@lru_cache(maxsize=1)
def load_slide_encoder(spec: SlideEncoderSpec, device: torch.device) -> LongNetViT:
    """The slide encoder of this process."""
    return open_slide_encoder(spec, device)

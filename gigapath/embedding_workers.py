"""What the workers of an embedding job keep: their device and their encoders."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from gigapath.device_claims import claim
from gigapath.slide_encoder import LongNetViT
from gigapath.slide_vectors import SlideEncoderSpec, open_slide_encoder
from gigapath.tile_inference import TileEncoder, TileEncoderSpec, choose_device


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
    if claims is None or chosen.type != "cuda" or chosen.index is not None:
        return chosen
    return torch.device("cuda", claim(claims, torch.cuda.device_count()))


@lru_cache(maxsize=1)
def load_tile_encoder(spec: TileEncoderSpec, device: torch.device) -> TileEncoder:
    """The tile encoder of this process."""
    return TileEncoder.open(spec, device=device)


@lru_cache(maxsize=1)
def load_slide_encoder(spec: SlideEncoderSpec, device: torch.device) -> LongNetViT:
    """The slide encoder of this process."""
    return open_slide_encoder(spec, device)

"""Weights and inputs of the golden runs that are not stored: noise by name, on any NumPy."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray


def _stream(tag: str) -> np.random.RandomState:
    # The legacy generator: its numbers are the same on every version of numpy.
    return np.random.RandomState(zlib.crc32(tag.encode()))


def _unit(tag: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Uniform noise of mean 0 and variance 1."""
    values = (2 * _stream(tag).random_sample(int(np.prod(shape))) - 1) * 3.0**0.5
    return values.reshape(shape)


def parameter(name: str, shape: tuple[int, ...], salt: str) -> NDArray[np.float32]:
    noise = _unit(f"{salt}:{name}", shape)
    if len(shape) == 3:
        value = 0.5 * noise
    elif len(shape) == 2:
        gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
        value = gain * noise / np.sqrt(shape[1])
    elif name.endswith(".weight"):
        value = 1 + 0.1 * noise
    else:
        value = 0.1 * noise
    return value.astype(np.float32)


def tiles(tag: str, *shape: int) -> NDArray[np.float32]:
    """Tile embeddings, `(L, C)` or `(B, L, C)`."""
    return _unit(f"x:{tag}", shape).astype(np.float32)


def coords(tag: str, *shape: int, ngrids: int, tile: int) -> NDArray[np.int64]:
    """Coordinates, `(L, 2)` or `(B, L, 2)`, of tiles `(L,)` or `(B, L)`."""
    places = _stream(f"c:{tag}").random_sample((*shape, 2))
    return np.floor(places * (ngrids * tile)).astype(np.int64)

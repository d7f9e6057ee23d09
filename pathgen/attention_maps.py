"""Attention over a slide as a picture: one square per patch, coloured by rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore.files import atomic_file
from wsi.store import read_attributes

CELL_PX = 8
MAX_SIDE_PX = 4096


def draw_attention(
    features_file: str | os.PathLike[str],
    coords: NDArray[np.int64],
    attention: NDArray[Any],
    out: str | os.PathLike[str],
) -> None:
    """Draws a heat map; the PNG is whole or absent.

    Colours show the rank of a patch among all of the slide, from dark to bright: weights of a
    softmax over thousands of patches differ by orders of magnitude. Where patches overlap, the mean
    is shown; outside them the picture is transparent.

    Args:
        features_file: Of the slide; its attributes say how large a patch is.
        coords: int64 `(N, 2)`: left and top in level-0 pixels.
        attention: `(N,)`.
        out: The PNG.
    """
    from matplotlib import colormaps
    from PIL import Image

    size_level0 = patch_size_level0(read_attributes(features_file), coords)
    values, covered = attention_grid(coords, ranks(attention), size_level0)
    pixels = (colormaps["inferno"](values) * 255).astype(np.uint8)
    pixels[~covered] = 0
    with atomic_file(Path(out)) as partial, partial.open("wb") as stream:
        Image.fromarray(pixels).save(stream, "PNG")


def ranks(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0 to 1, equal for equal scores."""
    from scipy.stats import rankdata

    if len(scores) == 1:
        return np.ones(1)
    found = (rankdata(scores) - 1) / (len(scores) - 1)
    return np.asarray(found, dtype=np.float64)


def attention_grid(
    coords: NDArray[np.int64], scores: NDArray[np.float64], size_level0: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Means of scores over the pixels of the picture `(height, width)`, and which have any.

    Args:
        coords: int64 `(N, 2)`.
        scores: `(N,)`.
        size_level0: Side of a patch in level-0 pixels.
    """
    origin = coords.min(axis=0)
    extent = (coords.max(axis=0) - origin) + size_level0
    scale = min(CELL_PX / size_level0, MAX_SIDE_PX / extent.max())
    width, height = np.maximum(1, np.ceil(extent * scale).astype(int))
    total, count = np.zeros((height, width)), np.zeros((height, width))
    starts = np.floor((coords - origin) * scale).astype(int)
    ends = np.maximum(starts + 1, np.floor((coords - origin + size_level0) * scale).astype(int))
    for (left, top), (right, bottom), score in zip(starts, ends, scores, strict=True):
        total[top:bottom, left:right] += score
        count[top:bottom, left:right] += 1
    covered = count > 0
    return np.divide(total, count, where=covered, out=np.zeros_like(total)), covered


def patch_size_level0(attributes: dict[str, Any], coords: NDArray[np.int64]) -> int:
    """Side of a patch in level-0 pixels: as the file says, or the least distance of two patches."""
    if "patch_size_level0" in attributes:
        return int(attributes["patch_size_level0"])
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return int(steps.min()) if len(steps) else 1

"""Features of a slide's patches, computed once and kept beside the coordinates they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore.encoders import Encoder
from wsi.openers import SlideError
from wsi.reader import Region, Slide
from wsi.store import (
    Coordinates,
    read_attributes,
    read_coordinates,
    read_features,
    write_features,
)

_SOURCE = "coords_sha256"


@dataclass(frozen=True)
class SlideFeatures:
    """What is known of a slide's patches.

    Attributes:
        features: float32 `(N, dim)`, of length 1.
        coords: int64 `(N, 2)`: left and top in level-0 pixels.
        num_damaged: Patches that could not be read and are left out.
        reused: Whether an earlier run had computed them.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    num_damaged: int
    reused: bool


def slide_features(
    slide_path: str | os.PathLike[str],
    coords_path: str | os.PathLike[str],
    encoder: Encoder,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
) -> SlideFeatures:
    """Returns the features of a slide's patches; computes them if they are not in `folder`.

    They are kept as `folder/<encoder>/<slide>.h5` and computed anew when coordinates or encoder
    have changed.

    Args:
        slide_path: The slide.
        coords_path: Its coordinates file.
        encoder: Computes the features.
        folder: Of kept features.
        batch_size: Patches encoded at once.

    Raises:
        SlideError: The slide cannot be opened, or none of its patches can be read.
        ValueError: The coordinates cannot be read or are none.
    """
    coordinates = read_coordinates(coords_path)
    if not len(coordinates.coords):
        raise ValueError(f"coordinates {coords_path}: no patches")
    out = Path(folder) / encoder.folder_name / f"{Path(coords_path).stem}.h5"
    source = _digest(coordinates)
    if out.is_file():
        attributes = read_attributes(out)
        if attributes.get(_SOURCE) == source:
            features, coords = read_features(out)
            damaged = len(coordinates.coords) - len(coords)
            return SlideFeatures(features.astype(np.float32), coords, damaged, True)
    features, coords = _compute(slide_path, coordinates, encoder, batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    described = {f"encoder_{k}": json.dumps(v) for k, v in encoder.describe().items()}
    attributes = {**read_attributes(coords_path), **described, _SOURCE: source}
    write_features(out, features, coords, encoder=encoder.folder_name, attributes=attributes)
    return SlideFeatures(features, coords, len(coordinates.coords) - len(coords), False)


def _compute(
    slide_path: str | os.PathLike[str],
    coordinates: Coordinates,
    encoder: Encoder,
    batch_size: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    order = np.lexsort((coordinates.coords[:, 0], coordinates.coords[:, 1]))  # shared tiles: once
    coords = coordinates.coords[order]
    size, pixels = coordinates.size_level0, coordinates.patch_px
    regions = [Region(int(x), int(y), size, pixels) for x, y in coords]
    good: list[int] = []
    parts: list[NDArray[np.float32]] = []
    fault: SlideError | None = None
    with Slide(slide_path) as slide:
        found = enumerate(slide.read_many(regions))
        for batch in _batches(found, batch_size):
            images = []
            for index, patch in batch:
                if isinstance(patch, SlideError):
                    fault = patch
                    continue
                good.append(index)
                images.append(_image(patch))
            if images:
                parts.append(encoder.encode_images(images).numpy())
    if not parts:
        raise SlideError(f"{slide_path}: no patch can be read; the last: {fault}")
    return np.concatenate(parts), coords[good]


def _image(pixels: NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _batches(items: Iterator[Any], size: int) -> Iterator[Sequence[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _digest(coordinates: Coordinates) -> str:
    digest = hashlib.sha256(coordinates.coords.tobytes())
    digest.update(f"{coordinates.size_level0} {coordinates.patch_px}".encode())
    return digest.hexdigest()

"""Computes the features of a slide's patches once, and caches them with their coordinates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.encoders import Encoder
from pathcore.files import StrPath
from wsi.features import SlideTiles, TileEmbeddings, embed_tiles
from wsi.reader import Slide, SlideError
from wsi.store import read_attributes, read_coordinates_of


@dataclass(frozen=True)
class _PatchEncoder:
    """Adapts an image-text encoder, which applies its own transform, to `embed_tiles`."""

    encoder: Encoder
    resize: None = None

    def encode(self, pixels: NDArray[np.uint8]) -> Any:
        return self.encoder.encode_images([Image.fromarray(patch) for patch in pixels])

    def describe(self) -> Mapping[str, Any]:
        described = self.encoder.describe()
        return {f"encoder_{name}": json.dumps(value) for name, value in described.items()}


def slide_features(
    slide_path: StrPath,
    coords_path: StrPath,
    encoder: Encoder,
    folder: StrPath,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> TileEmbeddings:
    """Returns the features of a slide's patches; computes them if they are not in `folder`.

    The features are stored in `folder/<encoder>/<slide>.h5` and recomputed if slide, coordinates or
    encoder have changed. An interrupted run continues where it stopped.

    Args:
        slide_path: Path of the slide.
        coords_path: Path of its coordinates file.
        encoder: Image-text encoder.
        folder: Folder of the features.
        batch_size: Number of patches per batch.
        workers: Number of processes that read patches ahead of the encoder; 0 uses a thread.
        progress: Whether to show a progress bar over the patches.

    Raises:
        SlideError: If the slide cannot be opened, or none of its patches can be read.
        OtherSlideError: If the coordinates belong to another slide.
        ValueError: If the coordinates cannot be read, or there are none.
    """
    path = Path(coords_path)
    if not Path(slide_path).is_file():  # not an OSError, which would end a job over many slides
        raise SlideError(f"{slide_path}: no such file")
    with Slide(slide_path) as slide:
        coordinates = read_coordinates_of(slide, path)
    if not len(coordinates.coords):
        raise ValueError(f"coordinates {path}: no patches")
    # Sorted by row, so that compressed tiles of the file that several patches overlap are decoded
    # once.
    order = np.lexsort((coordinates.coords[:, 0], coordinates.coords[:, 1]))
    tiles = SlideTiles(
        Path(slide_path),
        coordinates.coords[order],
        coordinates.size_level0,
        coordinates.patch_px,
        path.stem,
    )
    out = Path(folder) / encoder.folder_name
    return embed_tiles(
        tiles,
        _PatchEncoder(encoder),
        out / f"{path.stem}.h5",
        out / f".{path.stem}.parts",
        name=encoder.folder_name,
        weights_sha256=encoder.digest,
        attributes=read_attributes(path),
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )

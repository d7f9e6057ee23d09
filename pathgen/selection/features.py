"""Features of a slide's patches, computed once and kept beside the coordinates they belong to."""

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
from wsi.store import read_attributes, read_coordinates


@dataclass(frozen=True)
class _PatchEncoder:
    """An image-text encoder as `embed_tiles` takes one; it transforms images by itself."""

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
) -> TileEmbeddings:
    """Returns the features of a slide's patches; computes them if they are not in `folder`.

    They are kept as `folder/<encoder>/<slide>.h5` and computed anew when slide, coordinates or
    encoder have changed. A run that was stopped continues.

    Args:
        slide_path: The slide.
        coords_path: Its coordinates file.
        encoder: Computes the features.
        folder: Folder of the features.
        batch_size: Patches encoded at once.

    Raises:
        SlideError: If the slide cannot be opened, or none of its patches can be read.
        ValueError: If the coordinates cannot be read, or there are none.
    """
    coordinates, path = read_coordinates(coords_path), Path(coords_path)
    if not len(coordinates.coords):
        raise ValueError(f"coordinates {path}: no patches")
    # Row by row, so that tiles of the file that patches share are decoded once.
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
    )

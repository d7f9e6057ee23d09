"""Sizes of many images, read from their headers, and which of them cannot be opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from tqdm import tqdm

from pathcore.images import MAX_IMAGE_PIXELS, ImageError, image_size

_THREADS = 32  # opening a header waits for the disk or the network, not for the processor
_SILENT_BELOW = 5000


@dataclass(frozen=True)
class ImageIndex:
    """What the headers say.

    Attributes:
        sizes: `(width_px, height_px)` by file name.
        errors: Why a file cannot be used, by file name.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def size(self, name: str) -> tuple[int, int]:
        """Size of one image, `(width_px, height_px)`."""
        return self.sizes[name]


def index_images(
    folder: str | os.PathLike[str], names: Iterable[str], *, max_pixels: int = MAX_IMAGE_PIXELS
) -> ImageIndex:
    """Opens the header of every named image in a folder.

    Args:
        folder: Where the images lie.
        names: File names relative to it; names that lead out of the folder are errors.
        max_pixels: Larger images are errors.
    """
    root, names = Path(folder), list(names)
    index = ImageIndex()

    def measure(name: str) -> tuple[str, tuple[int, int] | None, str]:
        try:
            return name, image_size(path_inside(root, name), max_pixels=max_pixels), ""
        except ImageError as error:
            return name, None, str(error)

    with ThreadPoolExecutor(max_workers=min(_THREADS, len(names) or 1)) as pool:
        results = tqdm(
            pool.map(measure, names, chunksize=64),
            total=len(names),
            desc="image headers",
            disable=len(names) < _SILENT_BELOW,
        )
        for name, size, error in results:
            if size is None:
                index.errors[name] = error
            else:
                index.sizes[name] = size
    return index


def path_inside(folder: Path, name: str) -> Path:
    """Joins a file name from data to a folder, refusing names that lead out of it.

    Raises:
        ImageError: The name is absolute elsewhere or climbs out by `..`.
    """
    parts = PurePath(name)
    roots = (folder.absolute(), folder.resolve())  # the folder itself may be a link
    if parts.is_absolute() and not any(parts.is_relative_to(root) for root in roots):
        raise ImageError(f"{name}: lies outside the image folder {folder}")
    if ".." in parts.parts:
        raise ImageError(f"{name}: leads out of the image folder {folder}")
    return folder / name

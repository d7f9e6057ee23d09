"""Reads the sizes of many images from their headers and finds those that cannot be opened."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pathcore.files import StrPath
from pathcore.images import MAX_IMAGE_PIXELS, ImageError, image_size, path_inside

_THREADS = 32  # reading headers is bound by disk or network latency
_SILENT_BELOW = 5000  # files; fewer are read in a moment


@dataclass(frozen=True)
class ImageIndex:
    """Sizes and errors of indexed images.

    Attributes:
        sizes: `(width_px, height_px)` by file name.
        errors: Reason why a file cannot be used, by file name.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def size(self, name: str) -> tuple[int, int]:
        """Returns the size of one image, `(width_px, height_px)`."""
        return self.sizes[name]


def index_images(
    folder: StrPath, names: Iterable[str], *, max_pixels: int = MAX_IMAGE_PIXELS
) -> ImageIndex:
    """Reads the header of every named image in a folder.

    Args:
        folder: Image folder.
        names: File names relative to the folder; names that point outside it count as errors.
        max_pixels: Maximum number of pixels; larger images count as errors.
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

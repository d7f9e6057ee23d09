"""The libraries behind `wsi.reader.Slide`: OpenSlide, and Pillow for plain images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pathcore.jobs import UnitError
from wsi.diagnosis import explain

PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".svslide", ".bif"),
    *(".czi", ".dcm"),
)
"""Suffixes of the formats that OpenSlide 4 reads: https://openslide.org/formats."""

_MPP_TOLERANCE = 0.02
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


class SlideError(UnitError):
    """A slide that cannot be opened, or a region that cannot be read; the message says why."""

    reason = "slide unreadable"


class Backend(Protocol):
    """What `Slide` needs of a library. Regions lie inside the level.

    Attributes:
        level_dimensions: Width and height of each level.
        level_downsamples: Level-0 pixels per pixel of each level.
        mpp: Micrometres per pixel, if the file says.
        mpp_fault: What is wrong with the resolution that the file states; empty if nothing is.
        magnification: Magnification of the objective, if the file says.
    """

    level_dimensions: Sequence[tuple[int, int]]
    level_downsamples: Sequence[float]
    mpp: float | None
    mpp_fault: str
    magnification: float | None

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """RGB `(height, width, 3)`; `x` and `y` in level-0 pixels, the rest in the level's."""

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is not coarser than `downsample`."""

    def close(self) -> None:
        """Closes the file."""


def open_backend(path: Path) -> Backend:
    """Opens a file with the library that reads it.

    Raises:
        SlideError: None does; the message says why.
    """
    if path.suffix.lower() in PLAIN_SUFFIXES:
        return PlainImageBackend(path)
    reason = None
    try:
        return OpenSlideBackend(path)
    except SlideError as error:
        reason = error
    if path.suffix.lower() in (".tif", ".tiff") and explain(path) is None:
        return PlainImageBackend(path)  # no tiles inside: an ordinary picture
    raise reason


class OpenSlideBackend:
    """A file that OpenSlide reads. After a failed read it is opened anew: the old handle is dead.

    Args:
        path: The file.

    Raises:
        SlideError: OpenSlide does not open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        handle = self._open()
        properties = handle.properties
        self.vendor: str | None = properties.get("openslide.vendor")
        self.level_dimensions: Sequence[tuple[int, int]] = handle.level_dimensions
        self.level_downsamples: Sequence[float] = handle.level_downsamples
        x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.mpp, self.mpp_fault = square_mpp(x, y)
        self.magnification = _number(properties.get("openslide.objective-power"))

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        import openslide

        handle = self._open()
        try:
            rgba = handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            self.close()
            reason = explain(self.path) or f"cannot be read at ({x}, {y}), level {level}: {error}"
            raise SlideError(f"{self.path.name}: {reason}") from error
        return _over_white(np.asarray(rgba))

    def level_for(self, downsample: float) -> int:
        """See `Backend.level_for`."""
        fitting = [n for n, own in enumerate(self.level_downsamples) if own <= downsample]
        return max(fitting, default=0)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _open(self) -> Any:
        import openslide

        if self._handle is None:
            try:
                self._handle = openslide.OpenSlide(str(self.path))
            except (openslide.OpenSlideError, OSError, ValueError) as error:
                reason = explain(self.path) or f"OpenSlide cannot open it: {error}"
                raise SlideError(f"{self.path}: {reason}") from error
        return self._handle


class PlainImageBackend:
    """A picture as a slide of one level, kept in memory.

    Args:
        path: The file.

    Raises:
        SlideError: Pillow does not read it, or it is too large for memory.
    """

    def __init__(self, path: Path) -> None:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                if file.mode not in _PLAIN_MODES:
                    raise SlideError(
                        f"{path}: pixels of the kind {file.mode}; 8-bit grey or colour expected"
                    )
                image = ImageOps.exif_transpose(file).convert("RGBA")
        except Image.DecompressionBombError as error:
            raise SlideError(
                f"{path}: too large for a plain image; convert it to a tiled TIFF ({error})"
            ) from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: {explain(path) or error}") from error
        self._pixels = _over_white(np.asarray(image))
        self.level_dimensions: Sequence[tuple[int, int]] = [image.size]
        self.level_downsamples: Sequence[float] = [1.0]
        self.mpp: float | None = None
        self.mpp_fault = ""
        self.magnification: float | None = None

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        return self._pixels[y : y + height, x : x + width].copy()

    def level_for(self, downsample: float) -> int:
        """See `Backend.level_for`."""
        return 0

    def close(self) -> None:
        """See `Backend.close`."""


def square_mpp(x: float | None, y: float | None) -> tuple[float | None, str]:
    """Returns the micrometres per pixel of both directions as one number, and what is wrong.

    Patches of pixels that are not square would be distorted, so that their mean would be wrong for
    both directions. The tolerance covers scanners whose directions are calibrated separately.
    """
    if not (x and y):
        return None, ""
    if abs(x - y) > _MPP_TOLERANCE * max(x, y):
        return None, f"its pixels are not square: {x:g} x {y:g} micrometres"
    return (x + y) / 2, ""


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = rgba[..., 3:]
    if alpha.all() and int(alpha.min()) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weighted = rgba[..., :3] * (alpha / 255.0) + (255 - alpha)
    return np.rint(weighted).astype(np.uint8)


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None

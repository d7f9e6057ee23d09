"""Backends of `wsi.reader.Slide`.

OpenSlide reads slides, tifffile reads TIFF files that OpenSlide does not support or only in part,
and Pillow reads plain images.
"""

from __future__ import annotations

import math
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathcore.jobs import UnitError
from wsi.diagnosis import explain, is_tiff

PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".svslide", ".bif"),
    *(".czi", ".dcm"),
)
"""Suffixes of the formats that OpenSlide 4 reads: https://openslide.org/formats."""

_MPP_TOLERANCE = 0.02
"""Relative difference of horizontal and vertical resolution up to which pixels count as square."""

_ASPECT_TOLERANCE = 0.02
"""Relative difference of aspect ratios up to which a reduced page counts as a level."""

_NO_TISSUE = re.compile(r"\s*(label|macro|thumbnail)\b", re.IGNORECASE)
"""Beginning of the name or description of an image that scanners store beside the slide."""

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_MAX_SEGMENT_PX = 1 << 28  # 768 MiB as RGB
_SEGMENT_CACHE_BYTES = 256 << 20

# Values of the TIFF tags PhotometricInterpretation, PlanarConfiguration, ExtraSamples and
# Compression.
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _YCBCR = 0, 1, 2, 6
_SEPARATE = 2
_ASSOCIATED_ALPHA = 1
_JPEG_COMPRESSIONS = (6, 7, 34712, 33003, 33004, 33005)
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


class SlideError(UnitError):
    """Raised if a slide cannot be opened, or a region cannot be read; the message says why."""

    reason = "slide unreadable"


class Backend(Protocol):
    """Interface of the backends. Regions must lie inside the level.

    Attributes:
        level_dimensions: Width and height of each level.
        level_downsamples: Level-0 pixels per pixel of each level.
        mpp: Micrometres per pixel at level 0; None if the file does not state it.
        mpp_fault: Why the stated resolution cannot be used; empty if it can.
        magnification: Magnification of the objective; None if the file does not state it.
    """

    level_dimensions: Sequence[tuple[int, int]]
    level_downsamples: Sequence[float]
    mpp: float | None
    mpp_fault: str
    magnification: float | None

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """Returns RGB `(height, width, 3)`; `x` and `y` are level-0 pixels, sizes the level's."""

    def level_for(self, downsample: float) -> int:
        """Returns the coarsest level that is not coarser than `downsample`."""
        fitting = [n for n, own in enumerate(self.level_downsamples) if own <= downsample]
        return max(fitting, default=0)

    def close(self) -> None:
        """Closes the file."""


def open_backend(path: Path) -> Backend:
    """Opens a file with the first library that can read it.

    Raises:
        SlideError: If no library can. The message gives the reason of each.
    """
    if path.suffix.lower() in PLAIN_SUFFIXES:
        return PlainImageBackend(path)
    try:
        opened = OpenSlideBackend(path)
    except SlideError as error:
        if explain(path) is not None or not is_tiff(path):
            raise
        return _open_other_tiff(path, error)
    if opened.vendor != "generic-tiff":
        return opened
    # For a generic TIFF, OpenSlide reads the first image, which may be a thumbnail, and as grey if
    # it is one of several channels. It ignores levels that OME-TIFF stores as SubIFDs, and the
    # resolution in the OME-XML.
    try:
        tiff = TiffBackend(path)
    except UnreadableTiffError:
        return opened
    except SlideError:
        opened.close()
        raise
    sizes, first_sizes = tiff.level_dimensions, opened.level_dimensions
    if len(sizes) > len(first_sizes) or math.prod(sizes[0]) > math.prod(first_sizes[0]):
        opened.close()
        return tiff
    tiff.close()
    # Programs that state the resolution in the OME-XML may leave a default in the tags.
    if tiff.states_ome_mpp or (opened.mpp is None and not opened.mpp_fault):
        opened.mpp, opened.mpp_fault = tiff.mpp, tiff.mpp_fault
    return opened


def _open_other_tiff(path: Path, because: SlideError) -> Backend:
    """Opens a TIFF that OpenSlide cannot open, for instance one without tiles."""
    try:
        return TiffBackend(path)
    except UnreadableTiffError as error:
        reasons = [str(because), str(error)]
    try:
        return PlainImageBackend(path)
    except SlideError as error:
        reasons.append(str(error))
    details = "; ".join(reason.removeprefix(f"{path}: ") for reason in reasons)
    raise SlideError(f"{path}: {details}") from because


class OpenSlideBackend(Backend):
    """Reads a file by OpenSlide.

    The file is reopened after a failed read, because every later read of the old handle fails too.

    Raises:
        SlideError: If OpenSlide cannot open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        handle = self._open()
        properties = handle.properties
        self.vendor: str | None = properties.get("openslide.vendor")
        self.level_dimensions: Sequence[tuple[int, int]] = handle.level_dimensions
        self.level_downsamples: Sequence[float] = handle.level_downsamples
        x, y = (_parse_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.mpp, self.mpp_fault = square_mpp(x, y)
        self.magnification = _parse_number(properties.get("openslide.objective-power"))

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


class UnreadableTiffError(SlideError):
    """Raised if `TiffBackend` cannot decode the pixels of a TIFF; another library may."""


class TiffBackend(Backend):
    """Reads a TIFF by tifffile, with tiles or strips, with or without levels.

    Attributes:
        states_ome_mpp: Whether the resolution is that of the OME-XML.

    Raises:
        UnreadableTiffError: If the format of the pixels is not supported.
        SlideError: If the file holds several channels, is too large to decode, or if the format of
            an image that is not the first is not supported, since other libraries read the first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tiff = tifffile.TiffFile(path)
            try:
                pages = self._find_pages()
                self._check_pixels(pages)
            except BaseException:
                self._tiff.close()
                raise
        except (tifffile.TiffFileError, struct.error, OSError, TypeError, IndexError) as error:
            raise UnreadableTiffError(f"{path}: tifffile cannot open it: {error}") from error
        self._pages = pages
        self.level_dimensions: Sequence[tuple[int, int]] = [
            (page.imagewidth, page.imagelength) for page in pages
        ]
        width, height = self.level_dimensions[0]
        self.level_downsamples: Sequence[float] = [
            (width / w + height / h) / 2 for w, h in self.level_dimensions
        ]
        ome_mpp = _ome_mpp(self._tiff)
        self.states_ome_mpp = bool(ome_mpp and all(ome_mpp))
        self.mpp, self.mpp_fault = square_mpp(*(ome_mpp or _tag_mpp(pages[0])))
        self.magnification: float | None = None
        self._segments: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._segment_bytes = 0

    def _find_pages(self) -> list[Any]:
        """Returns the pages of the levels from fine to coarse.

        Files without SubIFDs may store levels as pages marked as reduced; thumbnails and labels
        with another aspect ratio are ignored.
        """
        series = self._find_series()
        channels = dict(zip(series.axes, series.shape, strict=True)).get("C", 1)
        first = series.keyframe
        if channels > 1 or (first.samplesperpixel > 2 and first.photometric == _MIN_IS_BLACK):
            number = channels if channels > 1 else first.samplesperpixel
            raise SlideError(
                f"{self.path}: {number} channels that are not red, green and blue, as of "
                "fluorescence; expected an RGB or grey image"
            )
        pages = [level.keyframe for level in series.levels]
        if len(pages) == 1:
            ratio = first.imagewidth / first.imagelength
            for page in self._tiff.pages:
                if (
                    isinstance(page, tifffile.TiffPage)
                    and page.is_reduced
                    and page.imagewidth < pages[-1].imagewidth
                    and abs(page.imagewidth / page.imagelength / ratio - 1) < _ASPECT_TOLERANCE
                ):
                    pages.append(page)
        return pages

    def _find_series(self) -> Any:
        """Returns the largest image of the file; the first one of OME-TIFF."""
        images = self._tiff.series
        if self._tiff.is_ome or len(images) < 2:
            return images[0]

        def num_pixels(series: Any) -> int:
            page = series.keyframe
            is_beside = _NO_TISSUE.match(series.name) or _NO_TISSUE.match(page.description)
            return 0 if page.is_reduced or is_beside else page.imagewidth * page.imagelength

        return max(images, key=num_pixels)  # the first of several equal ones

    def _check_pixels(self, pages: Sequence[Any]) -> None:
        unreadable: type[SlideError] = UnreadableTiffError
        where = str(self.path)
        if pages[0].index:
            unreadable, where = SlideError, f"{self.path}: image {pages[0].index}, the largest"
        for page in pages:
            kind = f"{page.bitspersample}-bit {page.photometric.name}, {page.compression.name}"
            eight_bit = page.dtype == np.uint8 and page.bitspersample == 8
            deep = page.dtype == np.uint16 and page.photometric == _RGB
            grey = page.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK) and page.samplesperpixel <= 2
            colour = page.photometric == _RGB and page.samplesperpixel in (3, 4)
            jpeg = page.photometric == _YCBCR and page.compression in _JPEG_COMPRESSIONS
            if not (eight_bit or deep) or not (grey or colour or jpeg):
                raise unreadable(f"{where}: pixels of the kind {kind}")
            if page.rowsperstrip and not page.is_tiled:
                size = page.imagewidth * min(page.rowsperstrip, page.imagelength)
            else:
                size = page.tilewidth * page.tilelength
            if size > _MAX_SEGMENT_PX:
                raise SlideError(
                    f"{self.path}: too large for a plain image: {size:,} pixels in one piece; "
                    "convert it to a tiled TIFF"
                )
            try:
                page.decode  # noqa: B018  # looks the codec up
            except (ValueError, ImportError) as error:
                raise unreadable(f"{where}: {error}") from error

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        page, scale = self._pages[level], self.level_downsamples[level]
        left, top = round(x / scale), round(y / scale)
        planes = page.samplesperpixel if page.planarconfig == _SEPARATE else 1
        samples = page.samplesperpixel
        result = np.full((height, width, samples), _blank(page), np.uint8)
        columns = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        span_x = page.tilewidth if page.is_tiled else page.imagewidth
        span_y = page.tilelength if page.is_tiled else page.rowsperstrip
        rows = -(-page.imagelength // span_y)
        right = min(left + width, page.imagewidth)
        bottom = min(top + height, page.imagelength)
        for plane in range(planes):
            for row in range(top // span_y, -(-bottom // span_y)):
                for column in range(left // span_x, -(-right // span_x)):
                    number = (plane * rows + row) * columns + column
                    segment = self._segment(level, page, number)
                    if segment is None:
                        continue
                    y0, x0 = row * span_y, column * span_x
                    upper, lower = max(top, y0), min(bottom, y0 + segment.shape[0])
                    first, last = max(left, x0), min(right, x0 + segment.shape[1])
                    part = segment[upper - y0 : lower - y0, first - x0 : last - x0]
                    place = result[upper - top : lower - top, first - left : last - left]
                    if planes > 1:
                        place[..., plane] = part[..., 0]
                    else:
                        place[:] = part
        return _to_rgb(result, page)

    def close(self) -> None:
        """See `Backend.close`."""
        self._tiff.close()

    def _segment(self, level: int, page: Any, number: int) -> NDArray[np.uint8] | None:
        """Returns a tile or strip `(height, width, samples)`; None if it was never written."""
        key = level, number
        if key in self._segments:
            return self._segments[key]
        offset, size = page.dataoffsets[number], page.databytecounts[number]
        if not size:
            return None
        try:
            handle = self._tiff.filehandle
            handle.seek(offset)
            data = handle.read(size)
            if len(data) < size:
                raise ValueError(f"expected {size:,} bytes, the file ends after {len(data):,}")
            decoded = page.decode(data, number, jpegtables=page.jpegtables)[0]
        except (ValueError, RuntimeError, OSError, struct.error, IndexError) as error:
            raise SlideError(
                f"{self.path.name}: tile or strip {number} of level {level} is corrupt: {error}"
            ) from error
        segment = decoded[0]
        if segment.dtype == np.uint16:  # rounded as libtiff does
            segment = ((segment.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        self._segments[key] = segment
        self._segment_bytes += segment.nbytes
        while self._segment_bytes > _SEGMENT_CACHE_BYTES and len(self._segments) > 1:
            self._segment_bytes -= self._segments.pop(next(iter(self._segments))).nbytes
        return segment


def _blank(page: Any) -> int:
    """Returns the sample value of white, with which tiles that were never written are filled."""
    return 0 if page.photometric == _MIN_IS_WHITE else 255


def _to_rgb(pixels: NDArray[np.uint8], page: Any) -> NDArray[np.uint8]:
    if page.photometric == _MIN_IS_WHITE:
        pixels = np.concatenate([255 - pixels[..., :1], pixels[..., 1:]], axis=2)
    if pixels.shape[2] <= 2:  # grey, perhaps with alpha
        pixels = np.concatenate([pixels[..., :1].repeat(3, axis=2), pixels[..., 1:]], axis=2)
    if pixels.shape[2] == 4 and page.extrasamples[:1] == (_ASSOCIATED_ALPHA,):
        # The colours are multiplied by alpha already; some writers round them above it.
        light = pixels[..., :3].astype(np.uint16) + (255 - pixels[..., 3:])
        return np.minimum(light, 255).astype(np.uint8)
    return _over_white(pixels) if pixels.shape[2] == 4 else np.ascontiguousarray(pixels)


def _ome_mpp(tiff: tifffile.TiffFile) -> tuple[float | None, float | None] | None:
    """Returns the pixel size from the OME-XML of a file in micrometres; None without OME-XML."""
    if not (tiff.is_ome and tiff.ome_metadata):
        return None
    try:
        root = ElementTree.fromstring(tiff.ome_metadata)
    except ElementTree.ParseError:
        return None
    pixels = next((e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None or pixels.get("PhysicalSizeX") is None:
        return None
    sizes = []
    for axis in "XY":
        value = _parse_number(pixels.get(f"PhysicalSize{axis}"))
        factor = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        sizes.append(value * factor if value and factor else None)
    return sizes[0], sizes[1]


def _tag_mpp(page: Any) -> tuple[float | None, float | None]:
    """Returns the pixel size from the resolution tags of a page in micrometres."""
    unit = {2: 25400.0, 3: 10000.0}.get(int(page.resolutionunit or 1))
    if unit is None:
        return None, None
    sizes = [unit / value if value else None for value in page.resolution]
    return sizes[0], sizes[1]


class PlainImageBackend(Backend):
    """Reads a plain image into memory as a slide with a single level.

    Raises:
        SlideError: If Pillow cannot read it, or it is too large for memory.
    """

    def __init__(self, path: Path) -> None:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                if file.mode not in _PLAIN_MODES:
                    raise SlideError(
                        f"{path}: pixels of the kind {file.mode}; expected 8-bit grey or colour"
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

    def close(self) -> None:
        """See `Backend.close`."""


def square_mpp(x: float | None, y: float | None) -> tuple[float | None, str]:
    """Joins horizontal and vertical resolution into one number.

    If pixels are not square, their mean would be wrong for both directions and patches would be
    distorted. The tolerance covers scanners that calibrate both directions separately.

    Returns:
        Micrometres per pixel, and the reason if the resolution cannot be used.

    Example:
        >>> square_mpp(0.25, 0.2502), square_mpp(0.25, 0.5)[0]
        ((0.2501, ''), None)
    """
    if not (x and y):
        return None, ""
    if abs(x - y) > _MPP_TOLERANCE * max(x, y):
        return None, f"its pixels are not square: {x:g} x {y:g} micrometres"
    return (x + y) / 2, ""


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # OpenSlide returns transparent black for areas that were not scanned; dropping the alpha
    # channel would turn them black instead of the white of glass.
    alpha = rgba[..., 3:]
    if alpha.all() and int(alpha.min()) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weighted = rgba[..., :3] * (alpha / 255.0) + (255 - alpha)
    return np.rint(weighted).astype(np.uint8)


def _parse_number(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None

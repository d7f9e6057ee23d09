"""Reads size, resolution and regions of slides.

`Slide` reads the formats of OpenSlide, other TIFF files and plain images. If a level is a plain
grid of JPEG tiles, each tile is decoded once for all regions that overlap it, instead of once per
region by OpenSlide. This is done only if a comparison on the file shows that the pixels are equal.

Example:
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "slide.png"
    >>> Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(file)
    >>> with Slide(file, mpp=0.5) as slide:
    ...     slide.dimensions, slide.mpp, slide.read(Region(10, 10, 32, 16)).shape
    ((80, 60), 0.5, (16, 16, 3))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.files import StrPath
from pathcore.jobs import UnitError
from wsi.diagnosis import is_tiff
from wsi.openers import PLAIN_SUFFIXES, Backend, OpenSlideBackend, SlideError, open_backend
from wsi.tiff_tiles import Box, TiffTiles, TiledLevel, TileError

__all__ = ["PLAIN_SUFFIXES", "Overview", "Region", "ResolutionError", "Slide", "SlideError"]

MAX_SIDE_PX = 1 << 16
"""Maximum side of a region in pixels, before and after scaling."""

_LEVEL_TOLERANCE = 1.01
"""Factor by which a level may be too coarse and still be used. Downsamples are quotients of rounded
sizes, such as 4.0003."""

_PLAUSIBLE_MPP = (0.01, 100.0)
"""Range of plausible micrometres per pixel; other values, such as 72 dots per inch (353 um/px),
describe a print."""

_PLAIN_GRIDS = ("aperio", "generic-tiff")
"""OpenSlide's names of the formats whose levels are single grids of tiles."""

_PROOF_TILES = 3
"""Number of tiles that are compared with OpenSlide, in addition to the last one."""

_BAND_PX = 1 << 24
"""Number of pixels per band of an overview."""

_DAMAGE_PX = 64
"""Side down to which pieces of a damaged level are halved; tiles are rarely smaller."""

_MAX_FAILED_READS = 4000
"""Number of failed reads after which an overview gives up: each one reopens the file, which takes
some milliseconds."""


class ResolutionError(UnitError):
    """Raised if the resolution of a slide is needed but not known."""

    reason = "resolution unknown"


@dataclass(frozen=True)
class Region:
    """A square region of a slide and the size of its image.

    Attributes:
        x_level0: Left edge in level-0 pixels; may lie outside the slide.
        y_level0: Top edge in level-0 pixels.
        size_level0: Side in level-0 pixels.
        size_px: Side of the resulting image in pixels.
    """

    x_level0: int
    y_level0: int
    size_level0: int
    size_px: int

    def __post_init__(self) -> None:
        for name in ("size_level0", "size_px"):
            if not 0 < getattr(self, name) <= MAX_SIDE_PX:
                raise ValueError(
                    f"{name}: expected 1 to {MAX_SIDE_PX} pixels, found {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution.

    Attributes:
        image: RGB; damaged parts are white.
        damaged: bool `(height, width)`, true where pixels could not be read.
    """

    image: Image.Image
    damaged: NDArray[np.bool_]


class Slide:
    """An open slide. Not thread-safe.

    Args:
        path: The file.
        mpp: Micrometres per pixel at level 0, overriding the file.
        magnification: Magnification of the objective, overriding the file.
        decode_tiles: Whether tiles may be decoded without OpenSlide if pixels are equal.

    Raises:
        SlideError: If the file cannot be opened; the message says why.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "slide.png"
        >>> Image.new("RGB", (1000, 600), "pink").save(file)
        >>> with Slide(file, mpp=0.25) as slide:
        ...     regions = [Region(x, 0, size_level0=512, size_px=256) for x in (0, 488)]
        ...     patches = list(slide.read_many(regions))
        ...     patches[0].shape, slide.overlap(Region(900, 0, 512, 256)), slide.thumbnail(100).size
        ((256, 256, 3), 'partial', (100, 60))
    """

    def __init__(
        self,
        path: StrPath,
        *,
        mpp: float | None = None,
        magnification: float | None = None,
        decode_tiles: bool = True,
    ) -> None:
        for name, value in (("mpp", mpp), ("magnification", magnification)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, found {value}")
        self.path = Path(path)
        self._backend: Backend = open_backend(self.path)
        self._mpp = mpp or _plausible(self._backend.mpp)
        self._magnification = magnification or self._backend.magnification
        self._tiles: TiffTiles | None = None
        self._proven: dict[int, bool] = {}
        if decode_tiles:
            self._tiles = self._open_tiles()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._backend.close()
        if self._tiles:
            self._tiles.close()

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height at level 0, in pixels."""
        return self._backend.level_dimensions[0]

    @property
    def level_dimensions(self) -> Sequence[tuple[int, int]]:
        """Width and height of every level, in pixels of the level."""
        return self._backend.level_dimensions

    @property
    def level_downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of each level."""
        return self._backend.level_downsamples

    @property
    def known_mpp(self) -> float | None:
        """Micrometres per pixel at level 0; None if neither file nor user states it."""
        return self._mpp

    @property
    def mpp(self) -> float:
        """Micrometres per pixel at level 0.

        Raises:
            ResolutionError: If neither file nor user states it.
        """
        if self._mpp is None:
            if self._backend.mpp_fault:
                raise ResolutionError(
                    f"{self.path.name}: {self._backend.mpp_fault}. Convert it to square pixels, or "
                    "give the resolution to assume as --slide-mpp (mpp=...)"
                )
            hint = ""
            if self._magnification:
                # 20x is about 0.5 um/px, but scanners differ by a tenth, so this is only a hint.
                hint = f"; its objective, {self._magnification:g}x, suggests about "
                hint += f"{10 / self._magnification:g}"
            raise ResolutionError(
                f"{self.path.name}: the file does not say how many micrometres a pixel spans"
                f"{hint}. Give it as --slide-mpp (mpp=...)"
            )
        return self._mpp

    @property
    def magnification(self) -> float | None:
        """Magnification of the objective; None if neither file nor user states it."""
        return self._magnification

    def overlap(self, region: Region) -> Literal["inside", "partial", "outside"]:
        """Returns whether a region lies inside, partly inside or outside the slide."""
        width, height = self.dimensions
        right, bottom = region.x_level0 + region.size_level0, region.y_level0 + region.size_level0
        if region.x_level0 >= width or region.y_level0 >= height or right <= 0 or bottom <= 0:
            return "outside"
        if min(region.x_level0, region.y_level0) < 0 or right > width or bottom > height:
            return "partial"
        return "inside"

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Reads one region, white outside the slide.

        Returns:
            RGB `(size_px, size_px, 3)`.

        Raises:
            SlideError: If the data under the region are damaged. Other regions can still be read.
        """
        (result,) = self.read_many([region])
        if isinstance(result, SlideError):
            raise result
        return result

    def read_many(self, regions: Sequence[Region]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """Reads regions in the given order; tiles that they share are decoded once.

        Regions sorted by position need the least memory.

        Yields:
            RGB `(size_px, size_px, 3)` for each region, white outside the slide, or an error for
            regions that cannot be read.
        """
        start = 0
        while start < len(regions):  # one run of regions that use the same level per iteration
            level = self._level_for(regions[start])
            end = start + 1
            while end < len(regions) and self._level_for(regions[end]) == level:
                end += 1
            yield from self._read_run(regions[start:end], level)
            start = end

    def thumbnail(self, max_side_px: int) -> Image.Image:
        """Returns the whole slide as an RGB image whose longer side is at most `max_side_px`.

        Damaged parts are white.

        Raises:
            SlideError: If nothing of the slide can be read, or it is damaged in very many places.
        """
        return self.overview(max_side_px).image

    def overview(self, max_side_px: int) -> Overview:
        """Returns the whole slide as an image, with a mask of its damaged parts.

        Args:
            max_side_px: Maximum length of the longer side.

        Raises:
            SlideError: If nothing of the slide can be read, or it is damaged in very many places.
        """
        scale = max(1.0, max(self.dimensions) / max_side_px)
        level = self._backend.level_for(scale * _LEVEL_TOLERANCE)
        width, height = self.level_dimensions[level]
        size = [max(1, round(length / scale)) for length in self.dimensions]
        # In bands, because a level may not fit into memory if the slide has no coarser one.
        num_bands = max(1, min(size[1], width * height // _BAND_PX))
        edges = np.linspace(0, size[1], num_bands + 1).round().astype(int)
        result = Image.new("RGB", (size[0], size[1]))
        damaged = np.zeros((size[1], size[0]), bool)
        budget = [_MAX_FAILED_READS]
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            top, bottom = (round(edge * height / size[1]) for edge in (start, end))
            box = (0, top, width, bottom - top)
            band = np.full((bottom - top, width, 3), 255, np.uint8)
            for left, upper, right, lower in self._read_around_damage(level, box, band, budget):
                columns = _covered(left, right, size[0] / width)
                rows = _covered(upper, lower, size[1] / height)
                damaged[rows, columns] = True
            shrunk = Image.fromarray(band).resize((size[0], end - start), Image.Resampling.BOX)
            result.paste(shrunk, (0, start))
        if damaged.all():
            raise SlideError(f"{self.path.name}: no part of the slide can be read")
        return Overview(result, damaged)

    def _read_around_damage(
        self, level: int, box: Box, canvas: NDArray[np.uint8], budget: list[int]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Reads a part of a level into `canvas`, halving it where it cannot be read as a whole.

        Args:
            level: The level.
            box: The part to read.
            canvas: Array for its pixels; remains unchanged where nothing can be read.
            budget: Number of reads that may still fail, as a list of one element that all bands
                share.

        Yields:
            Edges of the pieces that cannot be read, in pixels of the level.
        """
        pieces, scale = [box], self.level_downsamples[level]
        while pieces:
            left, top, width, height = pieces.pop()
            try:
                pixels = self._backend.read(
                    round(left * scale), round(top * scale), level, width, height
                )
            except SlideError as error:
                budget[0] -= 1
                if budget[0] < 0:
                    raise SlideError(
                        f"{self.path.name}: damaged in too many places; the last: {error}"
                    ) from error
                if max(width, height) <= _DAMAGE_PX:
                    yield left, top, left + width, top + height
                elif width >= height:
                    half = width // 2
                    pieces.append((left + half, top, width - half, height))
                    pieces.append((left, top, half, height))
                else:
                    half = height // 2
                    pieces.append((left, top + half, width, height - half))
                    pieces.append((left, top, width, half))
                continue
            row, column = top - box[1], left - box[0]
            canvas[row : row + height, column : column + width] = pixels

    def _level_for(self, region: Region) -> int:
        return self._backend.level_for(region.size_level0 / region.size_px * _LEVEL_TOLERANCE)

    def _read_run(
        self, regions: Sequence[Region], level: int
    ) -> Iterator[NDArray[np.uint8] | SlideError]:
        tiled = self._tiled_level(level, regions)
        boxes = [self._box(region, level) for region in regions]
        inside = [_inside(box, self.level_dimensions[level]) for box in boxes]
        decoded: Iterator[NDArray[np.uint8] | TileError] = iter(())
        if tiled and self._tiles:
            decoded = self._tiles.read_boxes(tiled, [box for box in inside if box])
        for region, box, part in zip(regions, boxes, inside, strict=True):
            pixels: NDArray[np.uint8] | SlideError | TileError
            if part is None:
                pixels = np.empty((0, 0, 3), np.uint8)
            elif tiled:
                pixels = next(decoded)
                if isinstance(pixels, TileError):  # OpenSlide may still read it
                    pixels = self._read_openslide(part, level, because=pixels)
            else:
                pixels = self._read_openslide(
                    part, level, origin=(max(0, region.x_level0), max(0, region.y_level0))
                )
            if isinstance(pixels, SlideError):
                yield pixels
            else:
                yield _resized(_on_white(pixels, box, part), region.size_px)

    def _read_openslide(
        self,
        part: Box,
        level: int,
        *,
        origin: tuple[int, int] | None = None,
        because: TileError | None = None,
    ) -> NDArray[np.uint8] | SlideError:
        scale = self.level_downsamples[level]
        x, y = origin or (round(part[0] * scale), round(part[1] * scale))
        try:
            return self._backend.read(x, y, level, *part[2:])
        except SlideError as error:
            return SlideError(str(because)) if because else error

    def _box(self, region: Region, level: int) -> Box:
        scale = self.level_downsamples[level]
        side = max(1, round(region.size_level0 / scale))
        return math.floor(region.x_level0 / scale), math.floor(region.y_level0 / scale), side, side

    def _open_tiles(self) -> TiffTiles | None:
        backend = self._backend
        if not isinstance(backend, OpenSlideBackend) or backend.vendor not in _PLAIN_GRIDS:
            return None
        if not is_tiff(self.path):
            return None
        try:
            return TiffTiles(self.path, self.level_dimensions)
        except TileError:
            return None  # OpenSlide could read the directory

    def _tiled_level(self, level: int, regions: Sequence[Region]) -> TiledLevel | None:
        """Returns the tiles of a level if decoding them gives the pixels that OpenSlide gives."""
        if self._tiles is None or level not in self._tiles.levels:
            return None
        scale = self.level_downsamples[level]
        # OpenSlide interpolates for positions between two pixels of the level.
        if scale != int(scale) or any(
            max(0, edge) % int(scale) for r in regions for edge in (r.x_level0, r.y_level0)
        ):
            return None
        if level not in self._proven:
            self._proven[level] = self._is_equal(self._tiles, level)
        return self._tiles.levels[level] if self._proven[level] else None

    def _is_equal(self, tiles: TiffTiles, level: int) -> bool:
        """Compares some tiles of a level with OpenSlide.

        The largest tiles in bytes have the most detail, in which decoders differ; the last tile is
        cut by the edges of the slide.
        """
        tiled, scale = tiles.levels[level], int(self.level_downsamples[level])
        richest = np.argsort(tiled.num_bytes, kind="stable")[-_PROOF_TILES:].tolist()
        compared = 0
        for number in {*richest, len(tiled.offsets) - 1}:
            row, column = divmod(number, tiled.num_columns)
            x, y = column * tiled.tile_width, row * tiled.tile_height
            width = min(tiled.tile_width, tiled.width - x)
            height = min(tiled.tile_height, tiled.height - y)
            try:
                expected = self._backend.read(x * scale, y * scale, level, width, height)
                found = tiles.decode(tiled, number)[:height, :width]
            except (SlideError, TileError):
                continue  # a damaged tile says nothing about the others
            if not np.array_equal(found, expected):
                return False
            compared += 1
        return compared > 0


def _plausible(mpp: float | None) -> float | None:
    low, high = _PLAUSIBLE_MPP
    return mpp if mpp is not None and low <= mpp <= high else None


def _covered(start: int, end: int, scale: float) -> slice:
    """Returns the pixels of a scaled image that a range of pixels contributes to."""
    return slice(math.floor(start * scale), math.ceil(end * scale))


def _inside(box: Box, size: tuple[int, int]) -> Box | None:
    """Returns the part of a box inside a level; None if there is none."""
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], size[0]), min(box[1] + box[3], size[1])
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def _on_white(pixels: NDArray[np.uint8], box: Box, part: Box | None) -> NDArray[np.uint8]:
    if part == box:
        return pixels
    canvas = np.full((box[3], box[2], 3), 255, np.uint8)
    if part:
        x, y = part[0] - box[0], part[1] - box[1]
        canvas[y : y + part[3], x : x + part[2]] = pixels
    return canvas


def _resized(pixels: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (size_px, size_px):
        return pixels
    # Antialiased bicubic, as TRIDENT resizes through Pillow.
    resized = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(resized)

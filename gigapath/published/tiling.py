"""Tiling as the original does it: Otsu on luminance, a box around the tissue, a padded grid in it.

`wsi.tiling` is the tiler of this project; this one gives the original's tiles. Two of its defects
are mended unless the `published` behaviour is asked for: it computes in 16-bit floats, in which the
occupancy of a tile of 256 px overflows, and it swaps x and y of the box's corner, which shifts
every coordinate. Sources: https://github.com/prov-gigapath/prov-gigapath, gigapath/preprocessing,
adapted there from https://github.com/microsoft/hi-ml.

Shapes: H height, W width, N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi.reader import Region, Slide, SlideError

Arithmetic = Literal["exact", "published"]
Origin = Literal["level0", "published"]

MIN_OCCUPANCY = 0.1
"""`occupancy_threshold` of the original's `tile_one_slide`."""

_BLOCK_PX = 2048
_MAX_SIDE_PX = 8192
_THUMBNAIL_PX = 2048


@dataclass(frozen=True)
class Box:
    """A rectangle in level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class GridTile:
    """A tile that holds enough tissue.

    Attributes:
        pixels: RGB `(tile_px, tile_px, 3)`, white outside the tissue's box.
        x_level0: Left edge, of the slide at level 0.
        y_level0: Top edge.
        x_named: Left edge as names and tables give it.
        y_named: Top edge as they give it.
        occupancy: Share of pixels darker than the threshold.
    """

    pixels: NDArray[np.uint8]
    x_level0: int
    y_level0: int
    x_named: int
    y_named: int
    occupancy: np.floating[Any]


def luminance(rgb: NDArray[np.uint8], arithmetic: Arithmetic = "exact") -> NDArray[Any]:
    """The mean of the channels, as float32, or as the original's float16.

    Args:
        rgb: `(..., H, W, 3)`.
        arithmetic: `exact` or `published`.

    Returns:
        `(..., H, W)`.
    """
    sums = rgb.sum(axis=-1, dtype=np.uint16)
    # Sums up to 765 are whole numbers in float16 too, so that only the division rounds.
    dtype = np.dtype(np.float16 if arithmetic == "published" else np.float32)
    table: NDArray[Any] = np.divide(np.arange(3 * 255 + 1).astype(dtype), dtype.type(3))
    return table[sums]


def foreground_threshold(values: NDArray[Any]) -> Any:
    """Otsu's threshold of luminance `(H, W)`; what is darker counts as tissue."""
    from skimage.filters import threshold_otsu

    return threshold_otsu(values)


def occupancies(tissue: NDArray[np.bool_], arithmetic: Arithmetic = "exact") -> NDArray[Any]:
    """The share of tissue in each tile; the published one overflows to infinity.

    Args:
        tissue: `(N, H, W)`.
        arithmetic: `exact` or `published`.

    Returns:
        `(N,)`.
    """
    if arithmetic == "published":
        with np.errstate(over="ignore"):
            return tissue.mean(axis=(-2, -1), dtype=np.float16)
    return tissue.mean(axis=(-2, -1), dtype=np.float64)


def bounding_box(tissue: NDArray[np.bool_], scale: float = 1.0) -> Box:
    """The smallest box around tissue `(H, W)`, in pixels of `1 / scale`.

    Raises:
        ValueError: There is none.
    """
    rows, columns = np.flatnonzero(tissue.any(axis=1)), np.flatnonzero(tissue.any(axis=0))
    if not len(rows):
        raise ValueError("no tissue")
    corner = (columns[0], rows[0])
    size = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    x, y, width, height = (int(value * scale) for value in (*corner, *size))
    return Box(x, y, width, height)


def grid(width: int, height: int, tile_px: int) -> NDArray[np.int64]:
    """Places tiles on an image, row by row; what is missing at the edges is shared between both.

    Returns:
        int64 `(N, 2)`: left and top, negative where a tile begins outside.
    """
    starts = []
    for length in (width, height):
        missing = -length % tile_px
        starts.append(np.arange(0, length + missing, tile_px, dtype=np.int64) - missing // 2)
    y, x = np.meshgrid(starts[1], starts[0], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def cut(image: NDArray[Any], coords: NDArray[np.int64], tile_px: int, fill: int = 255) -> Any:
    """Cuts tiles `(N, tile_px, tile_px, ...)` out of an image `(H, W, ...)`, filled outside."""
    tiles = np.full((len(coords), tile_px, tile_px, *image.shape[2:]), fill, image.dtype)
    height, width = image.shape[:2]
    for tile, (x, y) in zip(tiles, coords.tolist(), strict=True):
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + tile_px, width), min(y + tile_px, height)
        if right > left and bottom > top:
            tile[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return tiles


def assemble(
    tiles: NDArray[Any], coords: NDArray[np.int64], fill: float = np.nan
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Puts tiles `(N, side, side, ...)` back into one image, the smallest that holds them all.

    Returns:
        The image, and what to add to coordinates to find them in it.

    Raises:
        ValueError: Not as many tiles as coordinates.
    """
    if len(tiles) != len(coords) or not len(tiles):
        raise ValueError(f"{len(tiles)} tiles and {len(coords)} coordinates: as many expected")
    side, low = tiles.shape[1], coords.min(axis=0)
    width, height = (coords.max(axis=0) + side - low).tolist()
    image = np.full((height, width, *tiles.shape[3:]), fill, np.float64)
    for tile, (x, y) in zip(tiles, (coords - low).tolist(), strict=True):
        image[y : y + side, x : x + side] = tile
    return image, -low


@dataclass(frozen=True)
class Tissue:
    """Where the original sees tissue.

    Attributes:
        box: Around all of it.
        threshold: Luminance below which a pixel is tissue.
    """

    box: Box
    threshold: Any


def find_tissue(slide: Slide, arithmetic: Arithmetic = "exact") -> Tissue:
    """Finds tissue on the coarsest level.

    A slide without coarse levels is looked at as a thumbnail, unless `published` is asked for.

    Raises:
        ValueError: There is none.
    """
    last = len(slide.level_dimensions) - 1
    large = max(slide.level_dimensions[last]) > _MAX_SIDE_PX
    if large and arithmetic == "exact":
        image = np.asarray(slide.thumbnail(_THUMBNAIL_PX))
        scale = max(slide.dimensions) / max(image.shape[:2])
    else:
        image, scale = _read_level(slide, last), slide.level_downsamples[last]
    values = luminance(image, arithmetic)
    if values.min() == values.max():
        raise ValueError(f"{slide.path.name}: no tissue: every pixel is the same")
    threshold = foreground_threshold(values)
    return Tissue(bounding_box(values < threshold, scale), threshold)


def tissue_tiles(
    slide: Slide,
    tile_px: int,
    scale: float,
    tissue: Tissue,
    *,
    min_occupancy: float = MIN_OCCUPANCY,
    arithmetic: Arithmetic = "exact",
    origin: Origin = "level0",
) -> Iterator[GridTile | SlideError]:
    """Reads the tiles with enough tissue, row by row, in the memory of one row.

    Args:
        slide: The slide.
        tile_px: Side of a tile.
        scale: Level-0 pixels per pixel of a tile.
        tissue: See `find_tissue`.
        min_occupancy: A tile needs more.
        arithmetic: See `luminance` and `occupancies`.
        origin: How to name places: `level0`, or `published` with the corner's x and y swapped.
    """
    box = tissue.box
    size = (int(box.width * (1 / scale)), int(box.height * (1 / scale)))
    relative = grid(*size, tile_px)
    places = (scale * relative + (box.x, box.y)).astype(np.int64)
    named = (scale * relative + (box.y, box.x)).astype(np.int64)
    if origin == "level0":
        named = places
    side = max(1, round(tile_px * scale))
    regions = [Region(int(x), int(y), side, tile_px) for x, y in places]
    for number, pixels in enumerate(slide.read_many(regions)):
        if isinstance(pixels, SlideError):
            yield pixels
            continue
        tile = _whiten(pixels, relative[number], size)
        dark = luminance(tile, arithmetic) < tissue.threshold
        occupancy = occupancies(dark[None], arithmetic)[0]
        if occupancy > min_occupancy:
            (x, y), (x_named, y_named) = places[number].tolist(), named[number].tolist()
            yield GridTile(tile, x, y, x_named, y_named, occupancy)


def _whiten(
    pixels: NDArray[np.uint8], corner: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Outside the tissue's box a tile is white, whatever lies there."""
    side = len(pixels)
    (x, y), (width, height) = corner.tolist(), size
    left, top = max(-x, 0), max(-y, 0)
    right, bottom = min(side, width - x), min(side, height - y)
    if (left, top, right, bottom) == (0, 0, side, side):
        return pixels
    tile = np.full_like(pixels, 255)
    tile[top:bottom, left:right] = pixels[top:bottom, left:right]
    return tile


def _read_level(slide: Slide, level: int) -> NDArray[np.uint8]:
    """A whole level `(H, W, 3)`."""
    width, height = slide.level_dimensions[level]
    scale = slide.level_downsamples[level]
    side = min(_BLOCK_PX, max(width, height))
    image = np.empty((height, width, 3), np.uint8)
    places = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    span = max(1, round(side * scale))
    regions = [Region(round(x * scale), round(y * scale), span, side) for x, y in places]
    for (x, y), pixels in zip(places, slide.read_many(regions), strict=True):
        if isinstance(pixels, SlideError):
            raise pixels
        image[y : y + side, x : x + side] = pixels[: height - y, : width - x]
    return image

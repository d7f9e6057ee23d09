"""Tiler of the published code: Otsu on luminance, bounding box of the tissue, padded grid inside.

The tiler of this project is `wsi.tiling`; this one reproduces the published tiles. It corrects two
defects of the original, unless `published` is requested: the original computes in float16, in which
the occupancy of a 256 px tile overflows, and swaps x and y of the corner of the box, which shifts
all coordinates. Source: https://github.com/prov-gigapath/prov-gigapath, gigapath/preprocessing,
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
"""Side of the blocks in which a level is read."""

_MAX_SIDE_PX = 8192
"""Longest side of a coarsest level that is read whole; larger ones are replaced by a thumbnail."""

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
    """A tile with enough tissue.

    Attributes:
        pixels: uint8 RGB `(tile_px, tile_px, 3)`, white outside the box of the tissue.
        x_level0: Left edge in level-0 pixels.
        y_level0: Top edge in level-0 pixels.
        x_named: Left edge as given in file names and tables.
        y_named: Top edge as given in file names and tables.
        occupancy: Fraction of pixels darker than the threshold.
    """

    pixels: NDArray[np.uint8]
    x_level0: int
    y_level0: int
    x_named: int
    y_named: int
    occupancy: np.floating[Any]


def luminance(rgb: NDArray[np.uint8], arithmetic: Arithmetic = "exact") -> NDArray[Any]:
    """Returns the mean of the channels, as float32 or as the original's float16.

    Args:
        rgb: uint8 `(..., H, W, 3)`.
        arithmetic: `exact` or `published`.

    Returns:
        `(..., H, W)`.
    """
    sums = rgb.sum(axis=-1, dtype=np.uint16)
    # float16 represents sums up to 765 exactly, so only the division rounds, and a table of the 766
    # quotients gives the same values as dividing each pixel.
    dtype = np.dtype(np.float16 if arithmetic == "published" else np.float32)
    table: NDArray[Any] = np.divide(np.arange(3 * 255 + 1).astype(dtype), dtype.type(3))
    return table[sums]


def foreground_threshold(values: NDArray[Any]) -> Any:
    """Returns Otsu's threshold of luminance `(H, W)`; darker pixels count as tissue."""
    from skimage.filters import threshold_otsu

    return threshold_otsu(values)


def occupancies(tissue: NDArray[np.bool_], arithmetic: Arithmetic = "exact") -> NDArray[Any]:
    """Returns the fraction of tissue in each tile.

    Args:
        tissue: bool `(N, H, W)`.
        arithmetic: `exact` or `published`.

    Returns:
        `(N,)`.
    """
    if arithmetic == "published":
        # Counts above 65,504 overflow to infinity in float16, so full tiles always pass.
        with np.errstate(over="ignore"):
            return tissue.mean(axis=(-2, -1), dtype=np.float16)
    return tissue.mean(axis=(-2, -1), dtype=np.float64)


def bounding_box(tissue: NDArray[np.bool_], scale: float = 1.0) -> Box:
    """Returns the smallest box around tissue.

    Args:
        tissue: bool `(H, W)`.
        scale: Level-0 pixels per pixel of `tissue`.

    Raises:
        ValueError: If there is no tissue.
    """
    rows, columns = np.flatnonzero(tissue.any(axis=1)), np.flatnonzero(tissue.any(axis=0))
    if not len(rows):
        raise ValueError("no tissue")
    corner = (columns[0], rows[0])
    size = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    x, y, width, height = (int(value * scale) for value in (*corner, *size))
    return Box(x, y, width, height)


def grid(width: int, height: int, tile_px: int) -> NDArray[np.int64]:
    """Covers an image with tiles, row by row; the overhang is split between opposite edges.

    Returns:
        int64 `(N, 2)`, left and top; negative where a tile begins outside the image.

    Example:
        >>> grid(500, 256, tile_px=256).tolist()
        [[-6, 0], [250, 0]]
    """
    starts = []
    for length in (width, height):
        missing = -length % tile_px
        starts.append(np.arange(0, length + missing, tile_px, dtype=np.int64) - missing // 2)
    y, x = np.meshgrid(starts[1], starts[0], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def cut(image: NDArray[Any], coords: NDArray[np.int64], tile_px: int, fill: int = 255) -> Any:
    """Cuts tiles `(N, tile_px, tile_px, ...)` from an image `(H, W, ...)`, with `fill` outside."""
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
    """Assembles tiles `(N, side, side, ...)` into the smallest image that holds all of them.

    Returns:
        The image, and the offset `(2,)` from coordinates to pixels of the image.

    Raises:
        ValueError: If the numbers of tiles and coordinates differ, or there are none.
    """
    if len(tiles) != len(coords) or not len(tiles):
        raise ValueError(f"{len(tiles)} tiles and {len(coords)} coordinates: expected as many")
    side, low = tiles.shape[1], coords.min(axis=0)
    width, height = (coords.max(axis=0) + side - low).tolist()
    image = np.full((height, width, *tiles.shape[3:]), fill, np.float64)
    for tile, (x, y) in zip(tiles, (coords - low).tolist(), strict=True):
        image[y : y + side, x : x + side] = tile
    return image, -low


@dataclass(frozen=True)
class Tissue:
    """Tissue of a slide.

    Attributes:
        box: Bounding box of all tissue.
        threshold: Luminance below which a pixel is tissue.
    """

    box: Box
    threshold: Any


def find_tissue(slide: Slide, arithmetic: Arithmetic = "exact") -> Tissue:
    """Finds tissue on the coarsest level, as the original does.

    If that level is longer than 8192 px, a thumbnail of 2048 px replaces it, except with
    `published`.

    Raises:
        ValueError: If there is no tissue.
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
    """Reads the tiles with enough tissue, row by row.

    Args:
        slide: The slide.
        tile_px: Side of a tile in pixels.
        scale: Level-0 pixels per pixel of a tile.
        tissue: Result of `find_tissue`.
        min_occupancy: Fraction of tissue that a tile must exceed.
        arithmetic: `exact` or `published`, see `luminance` and `occupancies`.
        origin: Coordinates in names: `level0`, or `published` with x and y of the corner swapped.

    Yields:
        Tiles, and errors for tiles that cannot be read.
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
    """Whitens the pixels of a tile outside the box of the tissue, like the original's padding."""
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
    """Reads a whole level `(H, W, 3)` in blocks."""
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

"""Draws tile embeddings over their slide: tiles with similar embeddings get similar colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi.features import FolderTiles
from wsi.reader import Slide, SlideError

MAX_SIDE_PX = 2048
_RANGE = (1, 99)
"""Percentiles that map to 0 and 255, so that a few outliers do not take all the contrast."""

_GREY = 128
_BARE = (243, 243, 243)
"""Colour of the background, close to that of empty glass."""

_FADED = 0.25
"""Opacity of the slide below the coloured tiles."""

_GAP_PX = 16
_WIDE = 1.5
"""Aspect ratio from which the two pictures are stacked instead of placed side by side."""


def principal_colours(features: NDArray[Any]) -> NDArray[np.uint8]:
    """Maps the first three principal components to red, green and blue.

    Each component is stretched from its 1st to its 99th percentile. A component that is missing or
    does not vary becomes grey (128).

    Args:
        features: Tile embeddings `(N, dim)`.

    Returns:
        uint8 `(N, 3)`.

    Example:
        >>> principal_colours(np.random.default_rng(0).normal(size=(100, 384))).shape
        (100, 3)
    """
    from sklearn.decomposition import PCA

    colours = np.full((len(features), 3), _GREY, np.uint8)
    number = min(3, len(features) - 1, features.shape[1])
    if number < 1:
        return colours
    values = np.asarray(features, np.float64)
    # PCA divides by the total variance, which is 0 if all embeddings are equal.
    if not np.ptp(values, axis=0).any():
        return colours
    # Both solvers are deterministic; "auto" may choose a randomised one.
    components = PCA(number, svd_solver="full" if len(values) < 512 else "covariance_eigh")
    scores = components.fit_transform(values)
    low, high = np.percentile(scores, _RANGE, axis=0)
    for number, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if end > start:
            stretched = np.clip((scores[:, number] - start) / (end - start), 0, 1)
            colours[:, number] = np.round(255 * stretched)
    return colours


def draw_slide(
    slide: Slide, coords: NDArray[np.int64], size_level0: int, colours: NDArray[np.uint8]
) -> Image.Image:
    """Draws a slide and, beside it, its tiles in the given colours.

    Args:
        slide: The slide.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of a tile in level-0 pixels.
        colours: uint8 `(N, 3)`.
    """
    thumbnail = slide.thumbnail(MAX_SIDE_PX)
    scale = thumbnail.width / slide.dimensions[0]
    return _beside(thumbnail, coords * scale, size_level0 * scale, colours)


def draw_folder(
    tiles: FolderTiles, coords: NDArray[np.int64], colours: NDArray[np.uint8]
) -> Image.Image:
    """Draws a mosaic of tile images and, beside it, the tiles in the given colours.

    Args:
        tiles: All tiles of the folder.
        coords: int64 `(N, 2)`, left and top of the tiles that have a colour, in level-0 pixels.
        colours: uint8 `(N, 3)`.
    """
    low = tiles.coords.min(axis=0)
    width, height = (tiles.coords.max(axis=0) + tiles.size_level0 - low).tolist()
    scale = min(1.0, MAX_SIDE_PX / max(width, height))
    mosaic = Image.new("RGB", (max(1, round(width * scale)), max(1, round(height * scale))), _BARE)
    side = max(1, round(tiles.size_level0 * scale))
    for (x, y), pixels in zip(
        ((tiles.coords - low) * scale).round().astype(int).tolist(),
        tiles.read(range(len(tiles.coords))),
        strict=True,
    ):
        if not isinstance(pixels, SlideError):
            mosaic.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX), (x, y))
    return _beside(mosaic, (coords - low) * scale, tiles.size_level0 * scale, colours)


def _beside(
    image: Image.Image, corners: NDArray[Any], side: float, colours: NDArray[np.uint8]
) -> Image.Image:
    """Returns the image joined with a faded copy of it on which squares are drawn."""
    grey = image.convert("L").convert("RGB")
    painted = Image.blend(Image.new("RGB", image.size, _BARE), grey, _FADED)
    draw = ImageDraw.Draw(painted)
    squares = np.hstack([corners, corners + side]).round().astype(int).tolist()
    for (left, top, right, bottom), colour in zip(squares, colours.tolist(), strict=True):
        box = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(box, fill=tuple(colour))
    wide = image.width > _WIDE * image.height
    offset = (0, image.height + _GAP_PX) if wide else (image.width + _GAP_PX, 0)
    size = (image.width + offset[0], image.height + offset[1])
    both = Image.new("RGB", size if not wide else (image.width, size[1]), (255, 255, 255))
    both.paste(image, (0, 0))
    both.paste(painted, offset)
    return both

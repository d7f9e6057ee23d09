"""Draws a slide with its tissue and patches, for visual checks."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pathcore.files import StrPath, atomic_file
from wsi.artefacts import STEP_COLOURS
from wsi.geojson import TISSUE_COLOUR
from wsi.reader import Slide

if TYPE_CHECKING:
    from PIL import Image

    from wsi.tissue import TissueMask

_PATCH = (20, 60, 220)
_QUALITY = 88
_TINT = 0.6
_LEGEND_PX = 18  # height of a line, and side of its colour


def draw_patches(
    slide: Slide,
    coords: NDArray[np.int64],
    size_level0: int,
    *,
    mask: TissueMask | None = None,
    max_side_px: int = 2048,
    colours: NDArray[np.uint8] | None = None,
    changes: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Image.Image:
    """Draws patches and the outline of the tissue on a thumbnail.

    Args:
        slide: The slide.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of the squares in level-0 pixels.
        mask: Tissue of the slide; by default no outline is drawn.
        max_side_px: Length of the longer side of the picture.
        colours: uint8 RGB `(N, 3)`, one per square, for instance by cluster.
        changes: What each step of `wsi.artefacts.clean_mask` changed; drawn in the colour of the
            step, with a legend above the slide.
    """
    image = slide.thumbnail(max_side_px)
    for step, change in (changes or {}).items():
        shown = Image.fromarray(change).resize(image.size, 0)
        tint = Image.blend(image, Image.new("RGB", image.size, STEP_COLOURS[step]), _TINT)
        image = Image.composite(tint, image, shown)
    if mask is not None:
        image = Image.composite(
            Image.new("RGB", image.size, TISSUE_COLOUR), image, _outline(mask, image.size)
        )
    draw = ImageDraw.Draw(image)
    scale = np.array(image.size) / np.array(slide.dimensions)
    corners = np.hstack([coords * scale, (coords + size_level0) * scale - 1])
    for number, (left, top, right, bottom) in enumerate(corners.tolist()):
        colour = _PATCH if colours is None else tuple(map(int, colours[number]))
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour)
    return image if changes is None else _with_legend(image, changes)


def save_jpeg(image: Image.Image, path: StrPath) -> None:
    """Writes a picture as JPEG, atomically."""
    with atomic_file(path) as partial:
        image.save(partial, "JPEG", quality=_QUALITY)


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Returns colours of distinct hues, however many there are."""
    # Steps of the golden ratio spread hues evenly.
    golden = 0.618034
    hues = [(index * golden) % 1 for index in range(count)]
    rows = [colorsys.hsv_to_rgb(hue, 0.75, 0.95 - 0.3 * (i % 2)) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rows]


def _outline(mask: TissueMask, size: tuple[int, int]) -> Image.Image:
    from scipy.ndimage import binary_erosion

    tissue = np.asarray(Image.fromarray(mask.mask).resize(size, 0))
    return Image.fromarray(tissue & ~binary_erosion(tissue, np.ones((5, 5))))


def _with_legend(image: Image.Image, changes: Mapping[str, NDArray[np.bool_]]) -> Image.Image:
    """Puts a line per step above the slide: its colour, and how much of the slide it changed."""
    height = _LEGEND_PX * len(changes)
    result = Image.new("RGB", (max(image.width, 200), image.height + height), (255, 255, 255))
    result.paste(image, (0, height))
    draw = ImageDraw.Draw(result)
    for number, (step, change) in enumerate(changes.items()):
        top = number * _LEGEND_PX
        draw.rectangle((4, top + 4, 16, top + 14), fill=STEP_COLOURS[step])
        draw.text(
            (24, top + 2),
            f"{step}: {100 * change.mean():.2f} % of the slide",
            (0, 0, 0),
            font_size=14,
        )
    return result

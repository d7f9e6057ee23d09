"""Draws the clusters and the selected patches of a slide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pathgen.selection.sampling import SOURCES, Choice
from wsi.reader import Slide
from wsi.report import distinct_colours

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SOURCE_COLOURS = {"prompt": (200, 30, 30), "report": (20, 110, 40), "cluster": (20, 60, 220)}
"""Colour of a selected patch's outline by its source."""

_OPACITY = 0.45
_LEGEND_PX = 24


def draw_selection(
    slide: Slide,
    coords: NDArray[np.int64],
    size_level0: int,
    clusters: NDArray[np.int64],
    choices: Sequence[Choice],
    *,
    max_side_px: int = 1024,
) -> Image.Image:
    """Draws two views of a slide side by side: all patches by cluster, and the selected ones.

    Args:
        slide: The slide.
        coords: `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of a patch in level-0 pixels.
        clusters: `(N,)`, the cluster of each patch.
        choices: Selected patches.
        max_side_px: Longer side of each view.
    """
    image = slide.thumbnail(max_side_px)
    scale = np.array(image.size) / np.array(slide.dimensions)
    boxes = np.hstack(
        [coords * scale, np.maximum((coords + size_level0) * scale - 1, coords * scale)]
    )
    painted = image.copy()
    draw = ImageDraw.Draw(painted)
    colours = distinct_colours(int(clusters.max()) + 1)
    for box, cluster in zip(boxes.tolist(), clusters.tolist(), strict=True):
        draw.rectangle(tuple(box), fill=colours[cluster])
    left = Image.blend(image, painted, _OPACITY)
    draw = ImageDraw.Draw(image)
    width_px = max(1, max_side_px // 400)
    for choice in choices:
        draw.rectangle(
            tuple(boxes[choice.index].tolist()),
            outline=SOURCE_COLOURS[choice.source],
            width=width_px,
        )
    whole = Image.new("RGB", (2 * image.width + _LEGEND_PX, image.height + _LEGEND_PX), "white")
    whole.paste(left, (0, 0))
    whole.paste(image, (image.width + _LEGEND_PX, 0))
    _write_legend(ImageDraw.Draw(whole), image.size, len(colours), choices)
    return whole


def _write_legend(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], num_clusters: int, choices: Sequence[Choice]
) -> None:
    top = size[1] + _LEGEND_PX // 4
    draw.text((4, top), f"{num_clusters} clusters", fill="black")
    x = size[0] + _LEGEND_PX
    for source in SOURCES:
        count = sum(choice.source == source for choice in choices)
        text = f"{count} {source}"
        draw.text((x, top), text, fill=SOURCE_COLOURS[source])
        x += int(draw.textlength(text)) + 12

"""Interface between the page and the source of slides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

MAX_REGION_PX = 2048
"""Longer side of a region passed to the model; more than its 8 sub-images can show."""


@dataclass(frozen=True)
class SlideInfo:
    """Properties of a slide.

    Attributes:
        name: Name in the listing.
        width_px: Width at full resolution (level 0).
        height_px: Height at full resolution (level 0).
        mpp: Micrometres per pixel at level 0; None if the file does not state it.
    """

    name: str
    width_px: int
    height_px: int
    mpp: float | None


class SlideSource(Protocol):
    """A listing of slides. Names outside the listing raise `FileNotFoundError`."""

    def names(self) -> list[str]:
        """Returns the names of the slides that exist now, sorted."""

    def info(self, name: str) -> SlideInfo:
        """Returns size and resolution of a slide."""

    def thumbnail(self, name: str, max_side_px: int) -> Image.Image:
        """Returns the whole slide as RGB, with a longer side of at most `max_side_px`."""

    def region(
        self, name: str, left_level0: int, top_level0: int, side_level0: int, max_side_px: int
    ) -> Image.Image:
        """Returns a square region as RGB of at most `max_side_px`, white outside the slide."""


def square_around(
    info: SlideInfo, centre: tuple[float, float], size: float
) -> tuple[int, int, int]:
    """Places a square region on a slide.

    Args:
        info: Slide.
        centre: Centre of the square, as fractions of the slide's width and height.
        size: Side, in µm if the resolution is known, otherwise in pixels.

    Returns:
        `(left, top, side)` in level-0 pixels, shifted to lie inside the slide if it fits.

    Raises:
        ValueError: If `size` is not positive, or the centre lies outside the slide.

    Example:
        >>> square_around(SlideInfo("a.svs", 4000, 4000, mpp=0.5), (0.5, 0.5), 500.0)
        (1500, 1500, 1000)
    """
    if not 0 < size < 1e7:
        raise ValueError(f"size of the region: expected a positive number, found {size}")
    if not all(0 <= part <= 1 for part in centre):
        raise ValueError(f"centre {centre}: expected fractions of width and height")
    side = max(1, round(size / info.mpp if info.mpp else size))
    corner = [
        min(max(0, round(part * length - side / 2)), max(0, length - side))
        for part, length in zip(centre, (info.width_px, info.height_px), strict=True)
    ]
    return corner[0], corner[1], side

"""Slides as the page sees them; what reads the files is handed in from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

MAX_REGION_PX = 2048
"""Longer side of a region that is handed to the model: more than its 8 sub-images can show."""


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide.

    Attributes:
        name: As in the listing.
        width_px: At full resolution (level 0), like the height.
        height_px: See `width_px`.
        mpp: Micrometres per pixel at level 0; None where the file does not say.
    """

    name: str
    width_px: int
    height_px: int
    mpp: float | None


class SlideSource(Protocol):
    """A listing of slides. Names outside the listing raise `FileNotFoundError`."""

    def names(self) -> list[str]:
        """What there is now, sorted."""

    def info(self, name: str) -> SlideInfo:
        """Size and resolution."""

    def thumbnail(self, name: str, max_side_px: int) -> Image.Image:
        """The whole slide as RGB."""

    def region(
        self, name: str, left_level0: int, top_level0: int, side_level0: int, max_side_px: int
    ) -> Image.Image:
        """A square of the slide as RGB, shrunk to at most `max_side_px`; outside it is white."""


def square_around(
    info: SlideInfo, centre: tuple[float, float], size: float
) -> tuple[int, int, int]:
    """Places a square on a slide.

    Args:
        info: The slide.
        centre: As fractions of its width and height.
        size: Side, in µm where the resolution is known, otherwise in px.

    Returns:
        `(left, top, side)` in level-0 pixels, moved inside the slide where it fits.

    Raises:
        ValueError: A size that is none, or a centre outside the slide.
    """
    if not 0 < size < 1e7:
        raise ValueError(f"size of the region: a positive number expected, got {size}")
    if not all(0 <= part <= 1 for part in centre):
        raise ValueError(f"centre {centre}: fractions of width and height expected")
    side = max(1, round(size / info.mpp if info.mpp else size))
    corner = [
        min(max(0, round(part * length - side / 2)), max(0, length - side))
        for part, length in zip(centre, (info.width_px, info.height_px), strict=True)
    ]
    return corner[0], corner[1], side

"""Resolution of slides, under the name that the published demo imports."""

from __future__ import annotations

from pathcore.files import StrPath
from wsi.reader import ResolutionError, Slide

TOLERANCE_MPP = 0.1
"""Tolerance of the original; scanners differ by a few per cent from their nominal resolution."""


def find_level_for_target_mpp(slide_path: StrPath, target_mpp: float) -> int | None:
    """Returns the level of a slide whose resolution is within 0.1 micrometres of a target.

    The original reads only TIFF's resolution tags in centimetres; this function knows the
    resolution of every slide that `wsi.reader` reads.

    Returns:
        The finest such level, or None if there is none or the slide does not give its resolution.

    Raises:
        SlideError: If the file is not a slide.
    """
    with Slide(slide_path) as slide:
        try:
            mpp = slide.mpp
        except ResolutionError as error:
            print(error)
            return None
        for level, downsample in enumerate(slide.level_downsamples):
            if abs(mpp * downsample - target_mpp) < TOLERANCE_MPP:
                print(f"Level {level} has {mpp * downsample:.4g} micrometres per pixel.")
                return level
        levels = ", ".join(f"{mpp * downsample:.4g}" for downsample in slide.level_downsamples)
        print(f"No level has about {target_mpp:g} micrometres per pixel; the levels have {levels}.")
        return None

"""Finds the tissue of a slide by Otsu's threshold, or reads it from user-drawn masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import binary_closing, gaussian_filter
from skimage.filters import threshold_otsu

from pathcore.files import StrPath
from wsi.geojson import read_areas
from wsi.reader import Slide

MIN_SATURATION = 8
"""Lower bound of Otsu's threshold, in case a slide is bare glass. CLAM
(https://github.com/mahmoodlab/CLAM) uses the same constant for the same channel."""

MASK_SIDE_PX = 2048
_MAX_GLASS_SATURATION = 30
_MAX_GLASS_DEVIATION = 5
"""Median and median absolute deviation of the saturation above which pixels are not glass.

Measured: glass has a median of 0 to 15, yellowish glass up to 40 with a deviation of 1. The paler
half of sections that fill the slide has 50 to 90 with a deviation of 12 to 20."""

_BLUR_PX = 1.5
_ASPECT_TOLERANCE = 0.02
_JPEG_RINGS = 8
"""Fraction of the brightness of a JPEG mask, as a divisor, up to which pixels are black. If every
other pixel counted, white shapes would grow by 11 % at quality 75 and red ones by 62 %; with 8 they
grow by 0 and 7 %."""


@dataclass(frozen=True)
class TissueMask:
    """Tissue of a whole slide at low resolution.

    Attributes:
        mask: bool `(height, width)`.
        slide_size: Width and height of the slide at level 0, in pixels.
        damaged: bool `(height, width)`, true where the slide could not be read; None if unknown.
    """

    mask: NDArray[np.bool_]
    slide_size: tuple[int, int]
    damaged: NDArray[np.bool_] | None = None

    @property
    def fraction(self) -> float:
        """Fraction of the slide that is tissue."""
        return float(self.mask.mean())

    def fractions(self, coords: NDArray[np.int64], size_level0: int) -> NDArray[np.float64]:
        """Returns the fraction of tissue in each square; areas outside the slide have none.

        Args:
            coords: int64 `(N, 2)`, left and top in level-0 pixels.
            size_level0: Side of the squares in level-0 pixels.

        Returns:
            float64 `(N,)`, from 0 to 1.

        Example:
            >>> mask = TissueMask(np.array([[True, False], [True, True]]), slide_size=(1000, 1000))
            >>> mask.fractions(np.array([[0, 0], [500, 0]]), size_level0=1000).tolist()
            [0.75, 0.25]
        """
        height, width = self.mask.shape
        # A summed-area table gives the count of any rectangle by four look-ups.
        sums = np.zeros((height + 1, width + 1))
        sums[1:, 1:] = self.mask.cumsum(0).cumsum(1)
        scale = np.array([width, height]) / np.array(self.slide_size)
        # At least one pixel of the mask, since patches may be smaller than that.
        low = np.floor(coords * scale + 0.5).astype(np.int64)
        high = np.maximum(np.floor((coords + size_level0) * scale + 0.5).astype(np.int64), low + 1)
        areas = (high - low).prod(1)
        (x0, y0), (x1, y1) = (np.clip(edge, 0, [width, height]).T for edge in (low, high))
        return (sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / areas


def otsu_mask(slide: Slide, *, max_side_px: int = MASK_SIDE_PX) -> TissueMask:
    """Finds tissue by its saturation, which glass lacks.

    Applies Otsu's threshold (1979, https://doi.org/10.1109/TSMC.1979.4310076) to the blurred
    saturation of a thumbnail. Damaged parts of the slide count as tissue, so that patches there are
    read and reported as damaged instead of being missing without a trace.

    Raises:
        SlideError: If nothing of the slide can be read.
    """
    overview = slide.overview(max_side_px)
    rgb = np.asarray(overview.image)
    largest, smallest = rgb.max(2).astype(np.float32), rgb.min(2).astype(np.float32)
    saturation = np.divide(
        255 * (largest - smallest), largest, out=np.zeros_like(largest), where=largest > 0
    )
    saturation = gaussian_filter(saturation, _BLUR_PX).astype(np.uint8)
    threshold = _glass_threshold(saturation[~overview.damaged])
    tissue = saturation > threshold
    mask = binary_closing(tissue, np.ones((3, 3))) | tissue | overview.damaged
    return TissueMask(mask, slide.dimensions, overview.damaged)


def _glass_threshold(saturation: NDArray[np.uint8]) -> float:
    """Returns the saturation up to which a pixel is glass.

    Otsu's method divides any image into two classes. If tissue fills the whole slide, both classes
    are tissue; the lower class is then more saturated and less uniform than glass.
    """
    if saturation.min() == saturation.max():
        return MIN_SATURATION
    threshold = float(threshold_otsu(saturation))
    lower = saturation[saturation <= threshold]
    median = float(np.median(lower))
    deviation = float(np.median(np.abs(lower - median)))
    if median > _MAX_GLASS_SATURATION and deviation > _MAX_GLASS_DEVIATION:
        return MIN_SATURATION
    return max(threshold, MIN_SATURATION)


def image_mask(path: StrPath, slide: Slide) -> TissueMask:
    """Reads a mask from an image of the whole slide.

    Pixels that are neither black nor transparent are tissue; in JPEG, those that are at least an
    eighth as bright as the brightest, because its compression leaves dark rings around edges.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an image, or its aspect ratio differs from that of the slide.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"mask {path}: no such file")
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("L")) > 0
            if image.format == "JPEG" or image.info.get("compression") == "jpeg":
                brightness = np.asarray(image.convert("RGB")).max(axis=2)
                mask = brightness > brightness.max() / _JPEG_RINGS
            if image.has_transparency_data:
                mask &= np.asarray(image.convert("RGBA"))[..., 3] > 0
    except OSError as error:
        raise ValueError(f"mask {path}: cannot be read as an image: {error}") from error
    width, height = slide.dimensions
    ratio = (mask.shape[1] / mask.shape[0]) / (width / height)
    # The size of the mask is rounded to whole pixels, which changes its ratio by up to one pixel.
    slack = _ASPECT_TOLERANCE + 1 / min(mask.shape)
    if abs(ratio - 1) > slack:
        raise ValueError(
            f"mask {path}: {mask.shape[1]} x {mask.shape[0]} pixels; the slide has "
            f"{width} x {height}, another shape"
        )
    return TissueMask(mask, slide.dimensions)


def geojson_mask(path: StrPath, slide: Slide, *, max_side_px: int = MASK_SIDE_PX) -> TissueMask:
    """Reads outlines of tissue in level-0 pixels, as QuPath exports them.

    Args:
        path: A file as `wsi.geojson.read_areas` takes it; without features there is no tissue.
        slide: The slide.
        max_side_px: Length of the longer side of the mask.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not GeoJSON, contains no polygon, or one that lies outside the slide,
            as outlines of another scan do.
    """
    polygons = read_areas(path)
    width, height = slide.dimensions
    bounds = shapely.box(0, 0, width, height)
    outside = [polygon for polygon in polygons if not polygon.intersects(bounds)]
    if outside:
        x, y, *_ = outside[0].bounds
        raise ValueError(
            f"mask {path}: {len(outside)} of {len(polygons)} outlines lie outside the slide of "
            f"{width} x {height} px, the first at ({x:.0f}, {y:.0f}): expected level-0 pixels of "
            "this slide"
        )
    scale = min(1.0, max_side_px / max(width, height))
    image = Image.new("1", (max(1, round(width * scale)), max(1, round(height * scale))))
    draw = ImageDraw.Draw(image)
    # Large polygons first, because filling their holes would erase islands that lie in the holes.
    for polygon in sorted(polygons, key=lambda p: -p.envelope.area):
        for ring, value in ((polygon.exterior, 1), *((hole, 0) for hole in polygon.interiors)):
            draw.polygon([(x * scale, y * scale) for x, y, *_ in ring.coords], fill=value)
    return TissueMask(np.asarray(image), slide.dimensions)

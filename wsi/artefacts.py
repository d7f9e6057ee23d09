"""Removes unusable parts from a tissue mask: pen, dark edges, folds, blur.

Each step is a heuristic of quality-control tools such as HistoQC (Janowczyk et al. 2019,
doi:10.1200/CCI.18.00157). All except blur work on an overview of the slide. Thresholds on colour
assume haematoxylin and eosin. `STEPS` names the steps in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import (
    binary_closing,
    binary_dilation,
    binary_fill_holes,
    binary_opening,
    distance_transform_edt,
    find_objects,
    gaussian_filter,
    label,
    laplace,
)

from wsi.reader import Region, Slide, SlideError
from wsi.tissue import MASK_SIDE_PX, TissueMask

Mask = NDArray[np.bool_]

STEP_COLOURS = {
    "pen": (0, 150, 60),
    "edge": (40, 40, 40),
    "fold": (230, 120, 0),
    "blur": (0, 120, 230),
    "specks": (210, 0, 160),
    "holes": (250, 210, 0),
}
"""Colour of each step in pictures."""

STEPS = tuple(STEP_COLOURS)

_STROKE_UM2 = 10_000  # smallest pen stroke; a nucleus has about 50
_MARGIN_UM = 30  # around strokes and folds, where ink or tissue lies over glass
_GREY_CHROMA = 30  # of 255; stains have more
_PEN_BLACK, _EDGE_GREY = 90, 175
_EDGE_LENGTH = 0.3  # of the shorter side of the slide
_EDGE_WIDTH_UM = 400
_INK_SMOOTH_UM = 8  # more than a nucleus
_FOLD_UM = 10.0
_FOLD_DEVIATIONS = 2.0
_FOLD_LENGTH_UM, _FOLD_WIDTH_UM = 300, 200
_FOLD_EXCESS = 0.15
_BLUR_CELL_PX = 128
_BLUR_MPP = 1.0
_BLUR_MAX_MPP = 1.2
_BLUR_RATIO = 0.06
"""Largest variance of the Laplacian, relative to that of the grey values, of a blurred cell.

Measured at 1 um/px on fields of four real slides: sharp cells have 0.19 to 4, cells blurred by a
Gaussian of 1.5 um have 0.01 to 0.1, and of 2 um at most 0.05."""

_MIN_CONTRAST = 6.0  # standard deviation of grey values below which sharpness cannot be measured
_SPECK_UM2 = 20_000
_HOLE_UM2 = 40_000


@dataclass(frozen=True)
class _Overview:
    """A slide at the resolution of its mask: RGB `(height, width, 3)`, tissue, um per pixel."""

    slide: Slide
    rgb: NDArray[np.float32]
    tissue: Mask
    um: float
    changed: Mask = field(repr=False)

    def pixels(self, square_um: float) -> float:
        return square_um / self.um**2

    @property
    def value(self) -> NDArray[np.float32]:
        return self.rgb.max(axis=2)

    @property
    def chroma(self) -> NDArray[np.float32]:
        return self.rgb.max(axis=2) - self.rgb.min(axis=2)


def clean_mask(
    slide: Slide, mask: TissueMask, steps: Iterable[str]
) -> tuple[TissueMask, dict[str, Mask]]:
    """Applies steps to a mask.

    Args:
        slide: The slide.
        mask: Its tissue.
        steps: Names from `STEPS`, which determines the order.

    Returns:
        The cleaned mask, and for each step the pixels it removed; for `holes`, those it added.

    Raises:
        ValueError: If a step is unknown, or the slide is too coarse for `blur`.
        ResolutionError: If the resolution of the slide is unknown.
    """
    wanted = set(steps)
    if wanted - set(STEPS):
        raise ValueError(
            f"tissue steps: unknown {', '.join(sorted(wanted - set(STEPS)))}; "
            f"known are {', '.join(STEPS)}"
        )
    size = mask.mask.shape[::-1]
    image = slide.overview(MASK_SIDE_PX).image.resize(size, Image.Resampling.BOX)
    rgb = gaussian_filter(np.asarray(image, np.float32), (0.7, 0.7, 0))
    um = slide.mpp * max(slide.dimensions) / max(size)
    tissue, changes = mask.mask, {}
    changed = np.zeros_like(tissue)
    for step in (name for name in STEPS if name in wanted):
        overview = _Overview(slide, rgb, tissue, um, changed)
        found = _FUNCTIONS[step](overview)
        changes[step] = found & ~tissue & ~changed if step == "holes" else found & tissue
        if mask.damaged is not None:
            # Damaged parts stay, so that patches on them are reported.
            changes[step] &= ~mask.damaged
        tissue = tissue ^ changes[step]
        changed = changed | changes[step]
    return TissueMask(tissue, mask.slide_size, mask.damaged), changes


def _pen(view: _Overview) -> Mask:
    """Finds ink by its hue, which stains do not have, and black ink by being dark and grey.

    Haematoxylin has a hue of 245 degrees, eosin one of 300 to 350. Red ink differs from blood only
    in being brighter and more saturated.
    """
    smooth = gaussian_filter(view.rgb, (*[_INK_SMOOTH_UM / view.um] * 2, 0))
    value, chroma = smooth.max(axis=2), np.ptp(smooth, axis=2)
    saturation = chroma / np.maximum(value, 1)
    hue = _hue(smooth)
    seeds = (hue > 60) & (hue < 200) & (saturation > 0.2) & (chroma > _GREY_CHROMA)
    # The closer the hue is to haematoxylin, the more saturated blue ink must be.
    purer = 0.35 + np.maximum(hue - 230, 0) / 60
    seeds |= (hue >= 200) & (hue < 248) & (saturation > purer) & (chroma > 50) & (value > 110)
    seeds |= _dark(view, _PEN_BLACK) & ~_edge(view)
    reddish = (hue > 347) | (hue < 20)
    red = reddish & (saturation > 0.72) & (value > 180)
    weaker = ((hue > 335) | (hue < 20)) & (saturation > 0.55) & (value > 160)
    return _strokes(view, seeds, seeds) | _strokes(view, red, red | weaker)


def _edge(view: _Overview) -> Mask:
    """Finds grey or black lines and margins: the edges of coverslip and slide.

    They reach the border of the picture, or are long and thin.
    """
    grey = _dark(view, _EDGE_GREY)
    found = np.zeros_like(grey)
    shorter = min(grey.shape)
    for box, part in _components(grey):
        height, width = part.shape
        at_border = (
            box[0].start == 0
            or box[1].start == 0
            or box[0].stop == grey.shape[0]
            or box[1].stop == grey.shape[1]
        )
        longest = max(height, width)
        thickness = 2 * float(distance_transform_edt(np.pad(part, 1)).max()) * view.um
        if longest >= _EDGE_LENGTH * shorter and (at_border or thickness <= _EDGE_WIDTH_UM):
            found[box] |= part
    return binary_dilation(found, iterations=max(1, round(_MARGIN_UM / view.um)))


def _fold(view: _Overview) -> Mask:
    """Finds stripes of doubled tissue, which is darker and more saturated than the rest.

    The difference between saturation and intensity (Bautista and Yagi 2009, doi:10.1117/12.823293)
    exceeds the median of the tissue by two deviations along a line of 0.3 mm. Areas wider than
    0.2 mm do not count, as they are dense tissue.
    """
    # At 10 um per pixel, where lines have few pixels.
    size = [max(1, round(length * view.um / _FOLD_UM)) for length in view.tissue.shape]
    rgb = _resized(view.rgb, size)
    tissue = _resized(view.tissue.astype(np.float32), size) >= 0.5
    if not tissue.any():
        return np.zeros_like(view.tissue)
    saturation = np.ptp(rgb, axis=2) / np.maximum(rgb.max(axis=2), 1)
    difference = gaussian_filter(saturation - rgb.mean(axis=2) / 255, 1.5)
    median = np.median(difference[tissue])
    deviation = 1.4826 * np.median(np.abs(difference[tissue] - median))
    dark = tissue & (difference > median + max(_FOLD_EXCESS, _FOLD_DEVIATIONS * deviation))
    dark |= binary_closing(dark)
    lines = np.zeros_like(dark)
    for angle in np.arange(16) * np.pi / 16:
        lines |= binary_opening(dark, _line(_FOLD_LENGTH_UM / _FOLD_UM, angle))
    across = np.arange(-_FOLD_WIDTH_UM / 2, _FOLD_WIDTH_UM / 2 + 1, _FOLD_UM)
    disc = np.hypot(across[:, None], across) <= _FOLD_WIDTH_UM / 2
    folds = lines & ~binary_dilation(binary_opening(dark, disc), disc)
    found = binary_dilation(folds, iterations=round(_MARGIN_UM / _FOLD_UM))
    return _resized(found.astype(np.float32), list(view.tissue.shape)) >= 0.5


def _blur(view: _Overview) -> Mask:
    """Finds cells of 128 um whose edges are soft, at 1 um per pixel.

    Raises:
        ValueError: If the slide has more than 1.2 um per pixel.
    """
    slide = view.slide
    if slide.mpp > _BLUR_MAX_MPP:
        raise ValueError(
            f"{slide.path.name}: {slide.mpp:g} um per pixel; blur can be told up to "
            f"{_BLUR_MAX_MPP:g}, leave out the step"
        )
    side = round(_BLUR_CELL_PX * _BLUR_MPP / slide.mpp)
    columns, rows = (np.arange(0, length, side) for length in slide.dimensions)
    y, x = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    corners = np.stack([x, y], axis=1)
    shares = TissueMask(view.tissue, slide.dimensions).fractions(corners, side)
    corners = corners[shares > 0]
    regions = [Region(left, top, side, _BLUR_CELL_PX) for left, top in corners.tolist()]
    found = np.zeros_like(view.tissue)
    scale = np.array(found.shape[::-1]) / np.array(slide.dimensions)
    for corner, pixels in zip(corners, slide.read_many(regions), strict=True):
        if isinstance(pixels, SlideError) or not _is_blurred(pixels):
            continue
        (left, top), (right, bottom) = (
            np.round(edge * scale).astype(int) for edge in (corner, corner + side)
        )
        found[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return found


def _is_blurred(pixels: NDArray[np.uint8]) -> bool:
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    if grey.std() < _MIN_CONTRAST:
        return False
    return float(laplace(grey)[1:-1, 1:-1].var()) < _BLUR_RATIO * float(grey.var())


def _specks(view: _Overview) -> Mask:
    """Finds pieces of tissue smaller than 0.02 square millimetres."""
    found = np.zeros_like(view.tissue)
    for box, part in _components(view.tissue):
        if part.sum() < view.pixels(_SPECK_UM2):
            found[box] |= part
    return found


def _holes(view: _Overview) -> Mask:
    """Finds holes in the tissue smaller than 0.04 square millimetres, such as vessels and fat."""
    filled: Mask = binary_fill_holes(view.tissue)
    found = np.zeros_like(view.tissue)
    for box, part in _components(filled & ~view.tissue):
        if part.sum() < view.pixels(_HOLE_UM2):
            found[box] |= part
    return found


_FUNCTIONS: dict[str, Callable[[_Overview], Mask]] = {
    "pen": _pen,
    "edge": _edge,
    "fold": _fold,
    "blur": _blur,
    "specks": _specks,
    "holes": _holes,
}


def _dark(view: _Overview, value: float) -> Mask:
    return (view.value < value) & (view.chroma < _GREY_CHROMA)


def _strokes(view: _Overview, seeds: Mask, around: Mask) -> Mask:
    """Returns the parts of `around` with seeds as large as a stroke, with a margin."""
    found = np.zeros_like(seeds)
    seeds = binary_opening(seeds)
    for box, part in _components(binary_opening(around)):
        if (seeds[box] & part).sum() >= view.pixels(_STROKE_UM2):
            found[box] |= part
    return binary_dilation(found, iterations=max(1, round(_MARGIN_UM / view.um)))


def _components(mask: Mask) -> Iterator[tuple[tuple[slice, slice], Mask]]:
    """Yields the bounding box of each connected part, and the part within it."""
    labels, _ = label(mask, np.ones((3, 3)))
    for number, box in enumerate(find_objects(labels), 1):
        yield box, labels[box] == number


def _hue(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the hue in degrees `(height, width)`."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    largest, chroma = rgb.max(axis=2), np.maximum(np.ptp(rgb, axis=2), 1e-6)
    sextant = np.select(
        [largest == red, largest == green],
        [((green - blue) / chroma) % 6, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )
    return 60 * sextant


def _line(length: float, angle: float) -> Mask:
    """Returns a line as a structuring element."""
    steps = np.arange(-length / 2, length / 2 + 0.25, 0.5)
    rows = np.round(steps * np.sin(angle)).astype(int)
    columns = np.round(steps * np.cos(angle)).astype(int)
    reach = max(np.abs(rows).max(), np.abs(columns).max())
    element = np.zeros((2 * reach + 1, 2 * reach + 1), bool)
    element[rows + reach, columns + reach] = True
    return element


def _resized(values: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """Resizes `(height, width, ...)` by averaging over areas."""
    channels = values.reshape(*values.shape[:2], -1)
    resized = [
        np.asarray(Image.fromarray(channel).resize((size[1], size[0]), Image.Resampling.BOX))
        for channel in np.moveaxis(channels, 2, 0)
    ]
    return np.stack(resized, axis=2).reshape(*size, *values.shape[2:])

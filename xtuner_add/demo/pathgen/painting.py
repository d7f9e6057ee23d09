"""Synthetic whole slides with ground truth: tissue on glass, ink, fields out of focus.

Tissue and stains come from `xtuner_add.demo.tissue`, where a nucleus is about 8 px across; painted
at 1 micrometre per pixel, that is the size of real nuclei. Files are tiled pyramids of twice that
resolution, as scanners write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from pathcore.files import atomic_file
from xtuner_add.demo.histology import FloatMap, real_texture, to_rgb
from xtuner_add.demo.tissue import CHROMATIN, GLASS, PATTERNS, nuclear_densities, smooth_noise

PAINTED_MPP = 1.0
"""Micrometres per pixel of the painted image and of the patches."""
LEVEL0_MPP = 0.5
"""Micrometres per pixel of the files' largest level."""
SCALE = round(PAINTED_MPP / LEVEL0_MPP)

TISSUES = tuple(PATTERNS)
CLEAN, BLUR, INK = 0, 1, 2

_REGION_PX = 190.0
_MARGIN_PX = 48
_SMALLEST_PX = 64
_BLUR_SIGMA_PX = 3.0
_INKS = ((30, 110, 60), (35, 60, 150), (40, 40, 45))
_TILE_PX = 256
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class SlidePlan:
    """Content of a slide.

    Attributes:
        name: Name of the file, without suffix.
        width_px: Width of the painted image; the file is twice as wide.
        height_px: Height of the painted image; the file is twice as high.
        tissues: Kinds of tissue, from `TISSUES`.
        vesicular: Look of the nuclei: vesicular or solid.
        blurred: Whether a field is out of focus.
        inked: Whether there is a pen mark on the glass.
        has_mpp: Whether the file states its resolution.
        part: Part of the real texture that is used: `train` or `held_out`.
        seed: Seed of the painting.
    """

    name: str
    width_px: int
    height_px: int
    tissues: tuple[str, ...]
    vesicular: bool
    blurred: bool
    inked: bool
    has_mpp: bool
    part: str
    seed: int


@dataclass(frozen=True)
class PaintedSlide:
    """A slide with its ground truth, at `PAINTED_MPP`.

    Attributes:
        image: `(height_px, width_px, 3)` uint8.
        regions: `(height_px, width_px)`, index into `TISSUES`, or `GLASS`.
        artefacts: `(height_px, width_px)`, `CLEAN`, `BLUR` or `INK`.
    """

    image: NDArray[np.uint8]
    regions: NDArray[np.int8]
    artefacts: NDArray[np.int8]


def plan_slides(
    group: str, count: int, size_px: tuple[int, int], part: str, rng: np.random.Generator
) -> list[SlidePlan]:
    """Plans slides of four kinds of tissue each, every kind about equally often.

    Args:
        group: Prefix of their names.
        count: Number of slides.
        size_px: Width and height.
        part: See `SlidePlan`.
        rng: Generator of all random choices.
    """
    plans = []
    bag: list[str] = []
    for index in range(count):
        tissues: list[str] = []
        while len(tissues) < 4:
            if not bag:
                bag = [str(name) for name in rng.permutation(TISSUES)]
            name = next((name for name in bag if name not in tissues), None)
            if name is None:  # all remaining kinds are on this slide already
                bag = [str(name) for name in rng.permutation(TISSUES)]
                continue
            bag.remove(name)
            tissues.append(name)
        plans.append(
            SlidePlan(
                name=f"{group}_{index:02d}",
                width_px=size_px[0],
                height_px=size_px[1],
                tissues=tuple(tissues),
                vesicular=bool(index % 2),
                blurred=index % 4 in (0, 3),
                inked=index % 3 == 1,
                has_mpp=True,
                part=part,
                seed=int(rng.integers(2**31)),
            )
        )
    return plans


def paint_slide(plan: SlidePlan) -> PaintedSlide:
    """Paints a slide; the same plan gives the same pixels."""
    rng = np.random.default_rng(plan.seed)
    shape = (plan.height_px, plan.width_px)
    pieces, kinds = _pieces(shape, plan.tissues, rng)
    lookup = np.array([*(TISSUES.index(name) for name in kinds), GLASS], np.int8)
    regions = lookup[pieces]  # GLASS, index -1, selects the last entry
    haematoxylin, eosin = _stain(plan, pieces, kinds, rng)
    image = to_rgb(haematoxylin, eosin)
    artefacts = np.zeros(shape, np.int8)
    if plan.blurred:
        soft = ndimage.gaussian_filter(image, (_BLUR_SIGMA_PX, _BLUR_SIGMA_PX, 0))
        spot = _blob(shape, _centre_in(regions, rng), 0.2 * min(shape), rng)
        image = image + spot[..., None] * (soft - image)
        artefacts[spot > 0.5] = BLUR
    if plan.inked:
        stroke = _stroke(shape, regions, rng)
        ink = np.array(_INKS[rng.integers(len(_INKS))], np.float32)
        image *= 1 - stroke[..., None] * (1 - ink / 255)
        artefacts[stroke > 0.5] = INK
    return PaintedSlide(image.clip(0, 255).round().astype(np.uint8), regions, artefacts)


def write_slide(image: NDArray[np.uint8], file: Path, *, has_mpp: bool = True) -> None:
    """Writes a painted image as a tiled pyramid of `LEVEL0_MPP`, with levels of 1, 2 and 4.

    Args:
        image: `(rows, columns, 3)` at `PAINTED_MPP`.
        file: File to write, a `.tif`.
        has_mpp: Whether to state the resolution in the file.
    """
    import tifffile

    painted = Image.fromarray(image)
    size = (painted.width * SCALE, painted.height * SCALE)
    large = painted.resize(size, Image.Resampling.BICUBIC)
    options: dict[str, Any] = {
        "tile": (_TILE_PX, _TILE_PX),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": _JPEG_QUALITY},
        "subsampling": (1, 1),
        "metadata": None,
        "software": False,
        "datetime": None,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial, tifffile.TiffWriter(partial) as tiff:
        for level in range(3):
            view = large.resize((size[0] >> level, size[1] >> level), Image.Resampling.BOX)
            place: dict[str, Any] = {"subfiletype": 1} if level else {}
            if has_mpp:
                per_cm = 1e4 / (LEVEL0_MPP * 2**level)
                place |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            tiff.write(np.asarray(view), **options, **place)


def _pieces(
    shape: tuple[int, int], tissues: Sequence[str], rng: np.random.Generator
) -> tuple[NDArray[np.int64], list[str]]:
    """Divides two sections of tissue into pieces; returns each pixel's piece, -1 for glass."""
    rows, columns = np.indices(shape, dtype=np.float32)
    count = max(len(tissues), round(shape[0] * shape[1] / _REGION_PX**2))
    seeds = _spread_points(shape, count, rng)
    kinds = [tissues[index % len(tissues)] for index in range(count)]
    bend = 14 * np.stack([smooth_noise(shape, 60, rng) for _ in range(2)])
    points = np.stack([rows + bend[0], columns + bend[1]], axis=-1).reshape(-1, 2)
    _, nearest = cKDTree(seeds).query(points)
    pieces = nearest.reshape(shape).astype(np.int64)
    gap = shape[1] * rng.uniform(0.42, 0.58) + 10 * smooth_noise(shape, 90, rng)
    edge = np.minimum(
        np.minimum(rows, shape[0] - 1 - rows), np.minimum(columns, shape[1] - 1 - columns)
    )
    glass = (edge + 12 * smooth_noise(shape, 70, rng) < _MARGIN_PX) | (
        np.abs(columns - gap) < 0.35 * _MARGIN_PX
    )
    # Round corners, since no section is a rectangle.
    across = np.minimum(columns, np.minimum(np.abs(columns - gap), shape[1] - 1 - columns))
    glass |= np.hypot(
        np.clip(2.2 * _MARGIN_PX - edge, 0, None), np.clip(2.2 * _MARGIN_PX - across, 0, None)
    ) > 1.7 * _MARGIN_PX + 6 * smooth_noise(shape, 50, rng)
    pieces[glass] = -1
    return pieces, kinds


def _spread_points(
    shape: tuple[int, int], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns points far from each other, each the best of twenty random ones."""
    points = rng.uniform(0, 1, (1, 2)) * shape
    for _ in range(count - 1):
        drawn = rng.uniform(0, 1, (20, 2)) * shape
        distance = cKDTree(points).query(drawn)[0]
        points = np.vstack([points, drawn[distance.argmax()]])
    return points


def _stain(
    plan: SlidePlan, pieces: NDArray[np.int64], kinds: Sequence[str], rng: np.random.Generator
) -> tuple[FloatMap, FloatMap]:
    """Returns densities of haematoxylin and eosin; each piece is painted in its own frame."""
    texture = real_texture(plan.part)
    haematoxylin, eosin = np.zeros(pieces.shape, np.float32), np.zeros(pieces.shape, np.float32)
    strength = rng.uniform(0.8, 1.25, 2).astype(np.float32)
    dark = CHROMATIN * texture.haematoxylin
    for number, window in enumerate(ndimage.find_objects(pieces + 1)):
        if window is None:
            continue
        mask = ndimage.gaussian_filter((pieces[window] == number).astype(np.float32), 0.8)
        # Patterns are undefined on a canvas of a few pixels, so slivers are cut from a larger one.
        shape = (max(mask.shape[0], _SMALLEST_PX), max(mask.shape[1], _SMALLEST_PX))
        cut = (slice(mask.shape[0]), slice(mask.shape[1]))
        pattern = PATTERNS[kinds[number]](shape, texture, rng)
        covered, solid, vesicular = nuclear_densities(pattern.nuclei, shape)
        nuclear = vesicular if plan.vesicular else solid
        stained = pattern.haematoxylin * (1 - 0.6 * covered) + dark * nuclear
        haematoxylin[window] += mask * stained[cut]
        eosin[window] += mask * (pattern.eosin * (1 - 0.8 * covered))[cut]
    return strength[0] * haematoxylin, strength[1] * eosin


def _centre_in(regions: NDArray[np.int8], rng: np.random.Generator) -> NDArray[np.int64]:
    spots = np.argwhere(regions != GLASS)
    centre: NDArray[np.int64] = spots[rng.integers(len(spots))]
    return centre


def _blob(
    shape: tuple[int, int], centre: NDArray[np.int64], radius_px: float, rng: np.random.Generator
) -> FloatMap:
    """Returns a round, uneven spot with a soft edge: 1 inside, 0 outside."""
    rows, columns = np.indices(shape, dtype=np.float32)
    distance = np.hypot(rows - centre[0], columns - centre[1]) + 8 * smooth_noise(shape, 40, rng)
    spot: FloatMap = np.clip((radius_px - distance) / 6 + 0.5, 0, 1).astype(np.float32)
    return spot


def _stroke(
    shape: tuple[int, int], regions: NDArray[np.int8], rng: np.random.Generator
) -> FloatMap:
    """Returns the opacity of a pen line through the tissue."""
    centre = _centre_in(regions, rng)[::-1]
    length = 0.5 * min(shape)
    angle = rng.uniform(0, np.pi)
    bow = rng.uniform(-0.5, 0.5)
    along = np.linspace(-1, 1, 24)
    xs = centre[0] + length * (along * np.cos(angle) - bow * along**2 * np.sin(angle))
    ys = centre[1] + length * (along * np.sin(angle) + bow * along**2 * np.cos(angle))
    canvas = Image.new("L", (shape[1], shape[0]))
    line = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    ImageDraw.Draw(canvas).line(line, fill=255, width=34, joint="curve")
    opacity = ndimage.gaussian_filter(np.asarray(canvas, np.float32) / 255, 1.5)
    stroke: FloatMap = (0.86 * opacity).astype(np.float32)
    return stroke

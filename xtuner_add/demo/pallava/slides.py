"""Images like whole slides: pieces of tissue on glass, with a detail invisible in the thumbnail.

The detail is the look of the nuclei. Two drafts of a slide are drawn that differ only in it. The
chosen draft is then changed as little as possible so that its thumbnail equals that of the mean of
both. The thumbnail thus carries no trace of the answer, while the sub-images do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from xtuner_add.demo.histology import FloatMap, RealTexture, real_texture, to_rgb
from xtuner_add.demo.tissue import CHROMATIN, GLASS, PATTERNS, Nuclei, nuclear_densities


@dataclass(frozen=True)
class SlidePlan:
    """Content of a slide.

    Attributes:
        width_px: Width of the image.
        height_px: Height of the image.
        tissues: Names from `PATTERNS`, in their order along the longer side.
        vesicular: Look of all nuclei: vesicular (True) or solid.
        part: Part of the real texture that is used: `train` or `held_out`.
        seed: Seed of the drawing.
    """

    width_px: int
    height_px: int
    tissues: tuple[str, ...]
    vesicular: bool
    part: str
    seed: int


@dataclass(frozen=True)
class Slide:
    """A drawn slide.

    Attributes:
        image: `(height_px, width_px, 3)` uint8.
        regions: `(height_px, width_px)`, index into the plan's tissues, or `GLASS`.
    """

    image: NDArray[np.uint8]
    regions: NDArray[np.int8]


def draw_slide(plan: SlidePlan, thumbnail_px: int) -> Slide:
    """Draws a slide; the same plan gives the same pixels.

    Args:
        plan: Content of the slide.
        thumbnail_px: Side of the thumbnail that must not show the look of the nuclei.
    """
    rng = np.random.default_rng(plan.seed)
    shape = (plan.height_px, plan.width_px)
    texture = real_texture(plan.part)
    regions = _regions(shape, len(plan.tissues), rng)
    haematoxylin, eosin, nuclei = _compose(plan.tissues, regions, texture, rng)
    strength = rng.uniform(0.85, 1.2, 2).astype(np.float32)
    tissue = regions != GLASS
    covered, *looks = (tissue * density for density in nuclear_densities(nuclei, shape))
    dark = CHROMATIN * texture.haematoxylin
    solid, vesicular = (
        to_rgb(
            strength[0] * (haematoxylin * (1 - 0.6 * covered) + dark * nuclear),
            strength[1] * eosin * (1 - 0.8 * covered),
        )
        for nuclear in looks
    )
    drafts = (vesicular, solid) if plan.vesicular else (solid, vesicular)
    image = equalise_thumbnail(*drafts, thumbnail_px)
    return Slide(image, regions)


def equalise_thumbnail(image: FloatMap, other: FloatMap, thumbnail_px: int) -> NDArray[np.uint8]:
    """Changes an image so that its thumbnail is that of the mean of itself and another.

    The thumbnail is linear in the image, separately for rows and columns, so the pseudo-inverse
    gives the smallest change. Rounding to 8 bits leaves differences below one grey level.

    Args:
        image: `(height_px, width_px, 3)` in 0..255.
        other: The image drawn with the other detail.
        thumbnail_px: Side of the thumbnail, resized bicubically.
    """
    shrink_rows, grow_rows = _thumbnail_operators(image.shape[0], thumbnail_px)
    shrink_columns, grow_columns = _thumbnail_operators(image.shape[1], thumbnail_px)
    for _ in range(2):  # the second round repairs what clipping at black and white changed
        gap = np.einsum(
            "ir,rcd,jc->ijd", shrink_rows, (other - image) / 2, shrink_columns, optimize=True
        )
        change = np.einsum("ri,ijd,cj->rcd", grow_rows, gap, grow_columns, optimize=True)
        other = other - change
        image = (image + change).clip(0, 255)
        other = other.clip(0, 255)
    return image.round().astype(np.uint8)


@functools.cache
def _thumbnail_operators(side_px: int, thumbnail_px: int) -> tuple[FloatMap, FloatMap]:
    """Returns the matrix of Pillow's resizing of one line of pixels, and its pseudo-inverse."""
    identity = Image.fromarray(np.eye(side_px, dtype=np.float32))
    shrink = np.asarray(identity.resize((side_px, thumbnail_px), Image.Resampling.BICUBIC))
    return shrink, np.linalg.pinv(shrink).astype(np.float32)


def _regions(
    shape: tuple[int, int], num_tissues: int, rng: np.random.Generator
) -> NDArray[np.int8]:
    """Divides the slide along its longer side into pieces of tissue, surrounded by glass."""
    along, across = (1, 0) if shape[1] >= shape[0] else (0, 1)
    position = np.indices(shape, dtype=np.float32)
    wave = _waves(shape, rng) * 4.0
    extents = rng.uniform(0.8, 1.25, num_tissues)
    borders = np.concatenate([[0.0], np.cumsum(extents) / extents.sum()]) * shape[along]
    bent = position[along] + wave
    regions = (np.searchsorted(borders[1:-1], bent.ravel()).reshape(shape)).astype(np.int8)
    for border in borders[1:-1]:
        if rng.random() < 0.5:  # two separate pieces rather than one
            regions[np.abs(bent - border) < rng.uniform(1.5, 3.5)] = GLASS
    margin = rng.uniform(3, 7)
    for axis in (along, across):
        edge = np.minimum(position[axis], shape[axis] - 1 - position[axis]) + 0.6 * wave
        regions[edge < margin] = GLASS
    return regions


def _waves(shape: tuple[int, int], rng: np.random.Generator) -> FloatMap:
    field = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), 9, mode="wrap")
    return field / field.std()


def _compose(
    tissues: tuple[str, ...],
    regions: NDArray[np.int8],
    texture: RealTexture,
    rng: np.random.Generator,
) -> tuple[FloatMap, FloatMap, Nuclei]:
    """Returns the stain densities of all pieces without nuclei, and the nuclei."""
    shape = regions.shape
    haematoxylin, eosin = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    nuclei: list[Nuclei] = []
    for index, name in enumerate(tissues):
        pattern = PATTERNS[name](shape, texture, rng)
        mask = regions == index
        soft = ndimage.gaussian_filter(mask.astype(np.float32), 0.8)
        haematoxylin += soft * pattern.haematoxylin
        eosin += soft * pattern.eosin
        rows, columns = pattern.nuclei.centres.round().astype(int).T
        inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
        inside[inside] = mask[rows[inside], columns[inside]]
        nuclei.append(pattern.nuclei.select(inside))
    return haematoxylin, eosin, Nuclei.concatenate(nuclei)

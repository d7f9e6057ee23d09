"""Stain densities of a real colon section, and textures sampled from them.

The pixels are `skimage.data.immunohistochemistry()`, which is part of scikit-image: colonic glands
with haematoxylin (nuclei) and diaminobenzidine (brown, epithelium). Colour deconvolution (Ruifrok &
Johnston 2001, `skimage.color.rgb2hed`) gives the density of each stain, which the synthetic slides
then show in the colours of haematoxylin and eosin (H&E).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FloatMap = NDArray[np.float32]

_TRAIN_ROWS = 0.56
_WINDOW_PX = 24
_STEP_PX = 12
_SHRINK = 2
"""The section shows nuclei about 20 px long; halved, they have the size of the synthetic ones."""

HE_VECTORS = np.array(
    [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581], [0.0, 0.0, 0.0]], np.float32
)
"""Absorption of haematoxylin, eosin and nothing in red, green and blue: the reference of Macenko et
al. 2009 (doi:10.1109/ISBI.2009.5193250), as their code for stain normalisation states it."""


@dataclass(frozen=True)
class RealTexture:
    """Texture of real tissue: deviations from the mean stain density, unit variance.

    Attributes:
        epithelium: Windows `(n, 24, 24)` of the brown stain inside glands.
        stroma: Windows `(n, 24, 24)` of haematoxylin between the glands.
        haematoxylin: Median density of the darkest nuclei, the unit in which nuclei are drawn.
    """

    epithelium: FloatMap
    stroma: FloatMap
    haematoxylin: float

    def sample(self, kind: str, shape: tuple[int, int], rng: np.random.Generator) -> FloatMap:
        """Samples a texture of any shape that resembles the tissue, with mean 0 and variance 1.

        Random windows are blended with weights whose squares sum to one, which preserves the
        variance of the original (Heitz & Neyret 2018, doi:10.1145/3233304).
        """
        windows: FloatMap = getattr(self, kind)
        rows = shape[0] // _STEP_PX + 2
        columns = shape[1] // _STEP_PX + 2
        picked = windows[rng.integers(len(windows), size=(rows, columns))]
        flips = rng.integers(2, size=2)
        picked = picked[:, :, :: 1 - 2 * flips[0], :: 1 - 2 * flips[1]] * _blend_weights()
        # Each pixel is covered by 2 x 2 windows, the sum of four shifted mosaics without overlap.
        canvas = np.zeros(((rows + 1) * _STEP_PX, (columns + 1) * _STEP_PX), np.float32)
        for row in range(2):
            for column in range(2):
                part = picked[row::2, column::2]
                mosaic = part.transpose(0, 2, 1, 3).reshape(
                    part.shape[0] * _WINDOW_PX, part.shape[1] * _WINDOW_PX
                )
                top, left = row * _STEP_PX, column * _STEP_PX
                canvas[top : top + len(mosaic), left : left + mosaic.shape[1]] += mosaic
        top, left = rng.integers(_STEP_PX, size=2) + 1
        return canvas[top : top + shape[0], left : left + shape[1]]


@functools.cache
def _blend_weights() -> FloatMap:
    position = (np.arange(_WINDOW_PX) + 0.5) / _WINDOW_PX
    side = np.sin(np.pi * position)  # squares of adjacent weights sum to one
    return np.outer(side, side).astype(np.float32)


@functools.cache
def stain_densities() -> tuple[FloatMap, FloatMap]:
    """Returns densities of haematoxylin and diaminobenzidine of the section, each `(256, 256)`."""
    from skimage import color, data

    image = data.immunohistochemistry().astype(np.float32) / 255
    height, width = (side // _SHRINK for side in image.shape[:2])
    image = image.reshape(height, _SHRINK, width, _SHRINK, 3).mean(axis=(1, 3))
    stains = color.rgb2hed(image).astype(np.float32)
    return stains[..., 0], stains[..., 2]


@functools.cache
def real_texture(part: str) -> RealTexture:
    """Cuts texture windows from the rows of the section that are reserved for a part of the data.

    Args:
        part: `train` for the upper rows or `held_out` for the others, so that held-out slides are
            made of pixels that were never used in training.
    """
    haematoxylin, brown = stain_densities()
    epithelium = ndimage.gaussian_filter(brown, 4) > 0.6 * np.percentile(brown, 90)
    glass = ndimage.gaussian_filter(haematoxylin + brown, 4) < np.percentile(
        haematoxylin + brown, 12
    )
    border = round(len(brown) * _TRAIN_ROWS)
    rows = slice(0, border) if part == "train" else slice(border, None)
    return RealTexture(
        epithelium=_windows(brown[rows], epithelium[rows]),
        stroma=_windows(haematoxylin[rows], ~(epithelium | glass)[rows]),
        haematoxylin=float(np.percentile(haematoxylin, 98)),
    )


def _windows(density: FloatMap, region: NDArray[np.bool_]) -> FloatMap:
    """Returns the windows inside a region, normalised together to mean 0 and variance 1."""
    view = np.lib.stride_tricks.sliding_window_view
    shape = (_WINDOW_PX, _WINDOW_PX)
    inside = view(region, shape)[::3, ::3].mean(axis=(2, 3)) > 0.9
    windows = view(density, shape)[::3, ::3][inside]
    windows = windows - windows.mean()
    return np.ascontiguousarray(windows / windows.std(), dtype=np.float32)


def to_rgb(haematoxylin: FloatMap, eosin: FloatMap) -> FloatMap:
    """Converts stain densities of an H&E section to RGB `(rows, columns, 3)` in 0..255.

    Applies the Beer-Lambert law. Densities are fractions of six decades of absorption, as in
    scikit-image.
    """
    from skimage import color

    densities = np.stack([haematoxylin, eosin, np.zeros_like(eosin)], axis=-1).clip(0)
    return (color.combine_stains(densities, HE_VECTORS) * 255).astype(np.float32)

"""Seven kinds of tissue that a viewer can tell apart, as densities of haematoxylin and eosin.

Every pattern fills a canvas; each demo composes slides of them. Lengths are in px of the slide, in
which a nucleus is about 8 px across.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from xtuner_add.demo.histology import FloatMap, RealTexture

Shape = tuple[int, int]


@dataclass
class Nuclei:
    """Ellipses: centres `(n, 2)` as (y, x), half axes `(n, 2)`, angles `(n,)` in radians."""

    centres: NDArray[np.floating]
    axes: NDArray[np.floating]
    angles: NDArray[np.floating]

    def select(self, keep: NDArray[np.bool_]) -> Nuclei:
        """Keeps some of the nuclei."""
        return Nuclei(self.centres[keep], self.axes[keep], self.angles[keep])

    @staticmethod
    def concatenate(parts: list[Nuclei]) -> Nuclei:
        """Joins several sets."""
        return Nuclei(
            np.concatenate([part.centres for part in parts]),
            np.concatenate([part.axes for part in parts]),
            np.concatenate([part.angles for part in parts]),
        )


@dataclass
class Pattern:
    """One kind of tissue on a canvas: stain densities `(rows, columns)` without nuclei, nuclei."""

    haematoxylin: FloatMap
    eosin: FloatMap
    nuclei: Nuclei


def glands(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints round glands with an empty lumen, nuclei in a ring, in loose stroma."""
    centres = _scattered(shape, 44, 5, rng)
    radii = rng.uniform(15, 19, len(centres))
    distance, nearest = _polar(shape, centres, rng, wobble=0.14)
    radius = radii[nearest]
    wall = _step(radius - distance, 1.2)
    lumen = _step(0.42 * radius - distance, 1.2)
    real = texture.sample("epithelium", shape, rng)
    loose = texture.sample("stroma", shape, rng)
    epithelium = wall - lumen
    eosin = epithelium * (0.040 + 0.010 * real) + (1 - wall) * (0.016 + 0.003 * loose)
    haematoxylin = epithelium * (0.012 + 0.002 * real) + (1 - wall) * (0.004 + 0.003 * loose)
    parts = [_ring(centre, 0.74 * size, rng) for centre, size in zip(centres, radii, strict=True)]
    parts.append(_spindles(shape, 15, rng))
    nuclei = Nuclei.concatenate(parts)
    spindle = np.arange(len(nuclei.angles)) >= len(nuclei.angles) - len(parts[-1].angles)
    return Pattern(haematoxylin, eosin, nuclei.select(~spindle | (_at(wall, nuclei) < 0.1)))


def nests(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints solid round islands of cells, divided by pale septa."""
    centres = _scattered(shape, 40, 6, rng)
    tree = cKDTree(centres)
    (first, second), _ = _k_nearest(tree, shape, _warp(shape, 12, 2.5, rng))
    island = _step(second - first - 5.0, 1.5)
    real = texture.sample("epithelium", shape, rng)
    eosin = island * (0.030 + 0.006 * real) + (1 - island) * 0.014
    haematoxylin = island * (0.026 + 0.004 * real) + (1 - island) * 0.002
    nuclei = _lattice(shape, 10.5, (3.9, 4.4), rng)
    return Pattern(haematoxylin, eosin, nuclei.select(_at(island, nuclei) > 0.9))


def stroma(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints wavy collagen fibres, strongly pink, with thin spindle cells along them."""
    theta = rng.uniform(0, np.pi)
    rows, columns = np.indices(shape, dtype=np.float32)
    across = columns * np.cos(theta) + rows * np.sin(theta)
    wave = across + 5 * smooth_noise(shape, 30, rng)
    fibre = np.abs(np.sin(np.pi * wave / 8.0)) ** 0.7
    real = texture.sample("stroma", shape, rng)
    eosin = 0.022 + 0.040 * fibre + 0.006 * real
    haematoxylin = 0.003 + 0.004 * np.clip(real, 0, None)
    return Pattern(haematoxylin, eosin, _spindles(shape, 13, rng, theta + np.pi / 2))


def fat(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints large empty cells with thin membranes."""
    tree = cKDTree(_scattered(shape, 21, 4, rng))
    (first, second), _ = _k_nearest(tree, shape, _warp(shape, 8, 1.0, rng))
    membrane = _step(2.2 - (second - first), 0.8)
    real = texture.sample("stroma", shape, rng)
    nuclei = _lattice(shape, 17, (2.0, 4.0), rng)
    return Pattern(
        0.006 * membrane,
        membrane * (0.042 + 0.008 * real),
        nuclei.select(_at(membrane, nuclei) > 0.5),
    )


def lymphoid(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints dense sheets of small round nuclei with hardly any cytoplasm."""
    real = texture.sample("stroma", shape, rng)
    eosin = 0.010 + 0.002 * real
    haematoxylin = 0.022 + 0.004 * real
    return Pattern(haematoxylin, eosin, _lattice(shape, 7.6, (3.2, 3.5), rng))


def mucin(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints pale blue pools with fine streaks and a few floating clusters of cells."""
    rows, columns = np.indices(shape, dtype=np.float32)
    theta = rng.uniform(0, np.pi)
    wave = columns * np.cos(theta) + rows * np.sin(theta) + 9 * smooth_noise(shape, 26, rng)
    streak = np.clip(np.sin(2 * np.pi * wave / 11), 0, None) ** 2
    real = texture.sample("epithelium", shape, rng)
    haematoxylin = 0.010 + 0.013 * streak + 0.002 * real
    eosin = np.full(shape, 0.002, np.float32)
    centres = _scattered(shape, 46, 8, rng)
    distance, _ = _polar(shape, centres, rng, wobble=0.1)
    cluster = _step(11.0 - distance, 1.2)
    eosin = eosin + 0.026 * cluster
    nuclei = _lattice(shape, 9.5, (3.6, 4.0), rng)
    return Pattern(haematoxylin, eosin, nuclei.select(_at(cluster, nuclei) > 0.8))


def necrosis(shape: Shape, texture: RealTexture, rng: np.random.Generator) -> Pattern:
    """Paints structureless pink debris with cracks and a few remaining cells."""
    real = texture.sample("epithelium", shape, rng)
    grain = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), 1.0) * 3.5
    crack = _step(0.16 - np.abs(smooth_noise(shape, 10, rng)), 0.05)
    eosin = (0.062 + 0.010 * real + 0.008 * grain) * (1 - 0.75 * crack)
    haematoxylin = 0.007 + 0.002 * real
    nuclei = _lattice(shape, 20, (3.0, 3.6), rng)
    return Pattern(haematoxylin, eosin, nuclei.select(rng.random(len(nuclei.angles)) < 0.6))


PATTERNS: dict[str, Callable[[Shape, RealTexture, np.random.Generator], Pattern]] = {
    "glands": glands,
    "cell nests": nests,
    "fibrous stroma": stroma,
    "fat": fat,
    "lymphoid tissue": lymphoid,
    "mucin": mucin,
    "necrosis": necrosis,
}
"""Kinds of tissue by their name in captions and questions."""

CELLULAR = ("glands", "cell nests", "lymphoid tissue")
"""Tissues with enough nuclei to judge their look in every sub-image."""


GLASS = -1
"""Index of glass in maps of regions."""

CHROMATIN = 2.2
"""Haematoxylin of the darkest chromatin over that of the real section, which is stained weakly."""


def nuclear_densities(nuclei: Nuclei, shape: Shape) -> tuple[FloatMap, FloatMap, FloatMap]:
    """Draws nuclei; returns their area, and their haematoxylin if solid and if vesicular.

    Solid nuclei are evenly dark. Vesicular ones have a dark rim, a clear inside and a nucleolus;
    both contain about the same amount of stain, 1 at most.
    """
    if not len(nuclei.angles):
        empty = np.zeros(shape, np.float32)
        return empty, empty, empty
    # Ellipses hardly overlap, so that only the one with the nearest centre is drawn.
    _, (nearest,) = _k_nearest(cKDTree(nuclei.centres), shape, None, k=1)
    centres, axes = nuclei.centres.astype(np.float32), nuclei.axes.astype(np.float32)
    cos, sin = np.cos(nuclei.angles), np.sin(nuclei.angles)
    # One 2 x 3 map for each nucleus: from px to the circle of radius one.
    to_circle = np.stack([cos / axes[:, 1], sin / axes[:, 1], cos / axes[:, 0], -sin / axes[:, 0]])
    cos_u, sin_u, cos_v, sin_v = to_circle.astype(np.float32)[:, nearest]
    rows, columns = np.indices(shape, dtype=np.float32)
    dy, dx = rows - centres[nearest, 0], columns - centres[nearest, 1]
    rho = np.hypot(cos_u * dx + sin_u * dy, cos_v * dy + sin_v * dx)
    edge = _step((1.0 - rho) * axes.min(axis=1)[nearest], 0.7)
    rim = np.exp(-(((rho - 0.84) / 0.17) ** 2))
    nucleolus = np.exp(-((rho / 0.26) ** 2))
    vesicular = edge * np.clip(0.04 + 0.96 * rim + 0.9 * nucleolus, 0, 1)
    return edge, edge * np.float32(0.56), vesicular.astype(np.float32)


def _step(value: NDArray[np.floating], width: float) -> FloatMap:
    """Returns 0 below and 1 above zero, with a soft edge of about `width`."""
    return np.clip(0.5 + value / (2 * width), 0, 1).astype(np.float32)


def smooth_noise(shape: Shape, scale_px: float, rng: np.random.Generator) -> FloatMap:
    """Returns a smooth random field of unit variance."""
    coarse = rng.standard_normal((int(shape[0] / scale_px) + 4, int(shape[1] / scale_px) + 4))
    rows = np.linspace(1, coarse.shape[0] - 3, shape[0])
    columns = np.linspace(1, coarse.shape[1] - 3, shape[1])
    field = ndimage.map_coordinates(coarse, np.meshgrid(rows, columns, indexing="ij"), order=2)
    return (field / field.std()).astype(np.float32)


def _warp(shape: Shape, scale_px: float, amount_px: float, rng: np.random.Generator) -> FloatMap:
    """Returns a random displacement `(2, rows, columns)` in px."""
    return amount_px * np.stack([smooth_noise(shape, scale_px, rng) for _ in range(2)])


def _scattered(
    shape: Shape, spacing_px: float, jitter_px: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns points on a jittered hexagonal lattice that covers the canvas and a margin."""
    step = spacing_px * np.sqrt(3) / 2
    rows = np.arange(-1.5 * spacing_px, shape[0] + 1.5 * spacing_px, step)
    columns = np.arange(-1.5 * spacing_px, shape[1] + 1.5 * spacing_px, spacing_px)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2)[:, None] * spacing_px / 2
    points = np.stack([y.ravel(), x.ravel()], axis=1) + rng.uniform(0, spacing_px, 2)
    return points + rng.uniform(-jitter_px, jitter_px, points.shape)


def _k_nearest(
    tree: cKDTree, shape: Shape, warp: FloatMap | None, k: int = 2
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Returns distances and indices `(k, rows, columns)` of the nearest points to every pixel."""
    grid = np.indices(shape, dtype=np.float32)
    if warp is not None:
        grid = grid + warp
    distance, index = tree.query(grid.reshape(2, -1).T, k=list(range(1, k + 1)))
    return distance.T.reshape(k, *shape).astype(np.float32), index.T.reshape(k, *shape)


def _polar(
    shape: Shape, centres: NDArray[np.float64], rng: np.random.Generator, wobble: float
) -> tuple[FloatMap, NDArray[np.intp]]:
    """Returns distance to the nearest centre, distorted to make circles uneven, and its index."""
    (distance,), (nearest,) = _k_nearest(cKDTree(centres), shape, None, k=1)
    rows, columns = np.indices(shape, dtype=np.float32)
    angle = np.arctan2(rows - centres[nearest, 0], columns - centres[nearest, 1])
    phases = rng.uniform(0, 2 * np.pi, len(centres))[nearest]
    distance = distance * (1 + wobble * np.sin(2 * angle + phases))
    return distance.astype(np.float32), nearest


def _lattice(
    shape: Shape, spacing_px: float, axes_px: tuple[float, float], rng: np.random.Generator
) -> Nuclei:
    """Returns nuclei of one size all over the canvas."""
    centres = _scattered(shape, spacing_px, 0.16 * spacing_px, rng)
    size = rng.uniform(0.9, 1.1, (len(centres), 1))
    axes = np.asarray(axes_px, np.float64) * size
    return Nuclei(centres, axes, rng.uniform(0, np.pi, len(centres)))


def _ring(centre: NDArray[np.float64], radius_px: float, rng: np.random.Generator) -> Nuclei:
    """Returns nuclei side by side on a circle, whose long axes point at its centre."""
    count = max(int(2 * np.pi * radius_px / 9.0), 3)
    angles = np.arange(count) * (2 * np.pi / count) + rng.uniform(0, 2 * np.pi)
    radius = radius_px + rng.uniform(-1, 1, count)
    offsets = np.stack([np.sin(angles), np.cos(angles)], axis=1) * radius[:, None]
    axes = np.asarray([3.4, 4.6]) * rng.uniform(0.92, 1.08, (count, 1))
    return Nuclei(centre + offsets, axes, angles)


def _spindles(
    shape: Shape, spacing_px: float, rng: np.random.Generator, angle: float | None = None
) -> Nuclei:
    """Returns thin, long nuclei in one direction or in random ones."""
    nuclei = _lattice(shape, spacing_px, (1.6, 5.0), rng)
    if angle is not None:
        nuclei.angles = angle + rng.normal(0, 0.25, len(nuclei.angles))
    return nuclei.select(rng.random(len(nuclei.angles)) < 0.55)


def _at(field: FloatMap, nuclei: Nuclei) -> FloatMap:
    """Returns the values of a map at the centres of nuclei, 0 outside of the canvas."""
    rows, columns = nuclei.centres.round().astype(int).T
    inside = (rows >= 0) & (rows < field.shape[0]) & (columns >= 0) & (columns < field.shape[1])
    values = np.zeros(len(rows), np.float32)
    values[inside] = field[rows[inside], columns[inside]]
    return values

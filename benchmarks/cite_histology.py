"""Histology-like slides of three grades with scarce labels, and captioned fields to learn from.

Grades differ in the fraction of the tumour that forms glands. Everything else varies per slide:
other tissues, strength of both stains, appearance of the nuclei. A few slides of a grade are
therefore misleading. The demo's generator draws tissue from real stained pixels; validation slides
take their texture from another part of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cite.splits import write_patches
from pathcore.files import write_json
from xtuner_add.demo.histology import FloatMap, real_texture, to_rgb
from xtuner_add.demo.pallava.wording import field_caption
from xtuner_add.demo.tissue import CHROMATIN, PATTERNS, Nuclei, nuclear_densities

PATCH_PX = 64
GRADES = {
    "Well differentiated adenocarcinoma, glands": (0.85, 1.0),
    "Moderately differentiated adenocarcinoma, glands and cell nests": (0.4, 0.6),
    "Poorly differentiated adenocarcinoma, cell nests": (0.0, 0.15),
}
"""Description of a grade -> range of the fraction of glands in the tumour."""

OTHERS = ("fibrous stroma", "fat", "lymphoid tissue", "mucin", "necrosis")


@dataclass(frozen=True)
class Canvas:
    """Description of a square image of tissue.

    Attributes:
        side_px: Side of the square.
        shares: Tissue -> fraction of the area; they sum to 1.
        part: Part of the real texture to use: `train` or `held_out`.
        seed: Random seed.
        scale_px: Size of contiguous regions of one tissue.
    """

    side_px: int
    shares: tuple[tuple[str, float], ...]
    part: str
    seed: int
    scale_px: float = 14.0


def draw(canvas: Canvas) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Draws tissue; returns the image `(side, side, 3)` and tissue indices `(side, side)`."""
    rng = np.random.default_rng(canvas.seed)
    shape = (canvas.side_px, canvas.side_px)
    regions = _regions(shape, [share for _, share in canvas.shares], canvas.scale_px, rng)
    texture = real_texture(canvas.part)
    haematoxylin, eosin = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    nuclei = []
    for index, (name, share) in enumerate(canvas.shares):
        if not share:
            continue
        pattern = PATTERNS[name](shape, texture, rng)
        mask = regions == index
        soft = ndimage.gaussian_filter(mask.astype(np.float32), 0.8)
        haematoxylin += soft * pattern.haematoxylin
        eosin += soft * pattern.eosin
        nuclei.append(_inside(pattern.nuclei, mask))
    covered, solid, vesicular = nuclear_densities(Nuclei.concatenate(nuclei), shape)
    look = vesicular if rng.random() < 0.5 else solid
    strength = rng.uniform(0.6, 1.4, 2).astype(np.float32)
    image = to_rgb(
        strength[0]
        * (haematoxylin * (1 - 0.6 * covered) + CHROMATIN * texture.haematoxylin * look),
        strength[1] * eosin * (1 - 0.8 * covered),
    )
    return image.clip(0, 255).round().astype(np.uint8), regions


def make_slides(
    folder: Path,
    *,
    train: int = 24,
    val: int = 24,
    patches: int = 9,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Makes a folder in the layout of PatchGastric: patches and annotation files.

    Args:
        folder: Output folder for `patches/`, `train_all.txt` and `val.txt`.
        train: Number of training slides per grade.
        val: Number of validation slides per grade.
        patches: Number of patches per slide; a square number.
        workers: Number of processes.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    canvases: dict[str, tuple[Canvas, int]] = {}
    for part, count in (("train", train), ("held_out", val)):
        for number in range(count):
            for label, (low, high) in enumerate(GRADES.values()):
                canvases[f"{part[0]}{label}x{number:02d}"] = (
                    Canvas(
                        PATCH_PX * int(patches**0.5),
                        _grade_shares(rng.uniform(low, high), rng),
                        part,
                        int(rng.integers(2**31)),
                    ),
                    label,
                )
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [(name, canvas) for name, (canvas, _) in canvases.items()]
        list(pool.map(partial(_draw_slide, folder / "patches"), jobs, chunksize=4))
    for file, start in (("train_all.txt", "t"), ("val.txt", "h")):
        lines = [
            (f"{name}_{patch}.png", label)
            for name, (_, label) in canvases.items()
            for patch in range(patches)
            if name.startswith(start)
        ]
        write_patches(folder / file, lines)


def make_fields(folder: Path, *, canvases: int = 250, workers: int = 2, seed: int = 1) -> None:
    """Makes captioned fields of mixed tissue: `fields.npy` and `captions.json`."""
    rng = np.random.default_rng(seed)
    plans = []
    for _ in range(canvases):
        names = rng.choice(list(PATTERNS), size=rng.integers(2, 5), replace=False)
        shares = rng.dirichlet(np.full(len(names), 2.0))
        plans.append(
            Canvas(
                4 * PATCH_PX,
                tuple(zip(map(str, names), map(float, shares), strict=True)),
                "train",
                int(rng.integers(2**31)),
                scale_px=float(rng.uniform(10, 28)),
            )
        )
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(_draw_fields, plans, chunksize=4))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "fields.npy", np.concatenate([pixels for pixels, _ in drawn]))
    write_json(folder / "captions.json", [text for _, texts in drawn for text in texts])


def read_fields(folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Reads what `make_fields` made: `(N, 64, 64, 3)` and N captions."""
    return np.load(folder / "fields.npy"), json.loads((folder / "captions.json").read_text())


def tiles(image: NDArray[Any]) -> NDArray[Any]:
    """Cuts a square canvas into patches `(N, 64, 64, ...)`."""
    count = image.shape[0] // PATCH_PX
    rows = image.reshape(count, PATCH_PX, count, PATCH_PX, *image.shape[2:]).swapaxes(1, 2)
    return rows.reshape(-1, PATCH_PX, PATCH_PX, *image.shape[2:])


def _grade_shares(glands: float, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    tumour = rng.uniform(0.4, 0.8)
    others = rng.choice(OTHERS, size=2, replace=False)
    first = rng.uniform(0.3, 1.0)
    rest = 1 - tumour
    shares: Mapping[str, float] = {
        "glands": tumour * glands,
        "cell nests": tumour * (1 - glands),
        str(others[0]): rest * first,
        str(others[1]): rest * (1 - first),
    }
    return tuple((name, float(share)) for name, share in shares.items())


def _draw_slide(folder: Path, job: tuple[str, Canvas]) -> None:
    name, canvas = job
    image, _ = draw(canvas)
    for number, patch in enumerate(tiles(image)):
        Image.fromarray(patch).save(folder / f"{name}_{number}.png")


def _draw_fields(canvas: Canvas) -> tuple[NDArray[np.uint8], list[str]]:
    image, regions = draw(canvas)
    names = [name for name, _ in canvas.shares]
    captions = []
    for field in tiles(regions):
        shares = np.bincount(field.ravel(), minlength=len(names)) / field.size
        shown = [name for name, share in zip(names, shares, strict=True) if share > 0.15]
        captions.append(field_caption(shown, None))
    return tiles(image), captions


def _regions(
    shape: tuple[int, int], shares: Sequence[float], scale_px: float, rng: np.random.Generator
) -> NDArray[np.int8]:
    """Divides smooth noise at quantiles, tissue by tissue, so that fractions are exact."""
    regions = np.full(shape, -1, np.int8)
    for index, share in enumerate(shares):
        free = np.flatnonzero(regions.ravel() < 0)
        noise: FloatMap = ndimage.gaussian_filter(rng.standard_normal(shape), scale_px)
        count = min(round(share * regions.size), len(free))
        if index == len(shares) - 1:
            count = len(free)
        chosen = free[np.argsort(noise.ravel()[free])[:count]]
        regions.ravel()[chosen] = index
    return regions


def _inside(nuclei: Nuclei, mask: NDArray[np.bool_]) -> Nuclei:
    rows, columns = nuclei.centres.round().astype(int).T
    inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    inside[inside] = mask[rows[inside], columns[inside]]
    return nuclei.select(inside)

"""Draws the scores of a slide's patches as maps.

Coordinates are (x, y) of the top left corner of a patch, usually in level-0 pixels.

Shapes: N patches, C classes.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore.figures import draw_maps, save_figure
from pathcore.files import StrPath
from pathcore.images import IMAGE_SUFFIXES
from pathcore.rows import read_csv

_MAX_CELLS = 4_000_000
"""Maximum number of cells of a map; more indicates wrong coordinates."""


@dataclass(frozen=True)
class Layout:
    """Positions of the patches of a slide.

    Attributes:
        names: File names of the patches.
        coords_px: int64 `(N, 2)`, x and y.
        patch_px: Side of a patch in the same pixels.
        is_known: Whether positions are real; otherwise patches are arranged in rows by number.
    """

    names: tuple[str, ...]
    coords_px: NDArray[np.int64]
    patch_px: int
    is_known: bool = True


def score_map(
    scores: NDArray[np.floating[Any]], coords_px: NDArray[np.int64], patch_px: int
) -> NDArray[np.float64]:
    """Arranges scores as an image with one cell per step of the patch grid.

    If patches overlap, a cell is the mean of the patches that cover it.

    Args:
        scores: float `(N, C)`.
        coords_px: int64 `(N, 2)`, x and y.
        patch_px: Side of a patch in the same pixels.

    Returns:
        float64 `(rows, columns, C)`; NaN where there is no patch.

    Raises:
        ValueError: If there are no patches, lengths differ, or patches are too far apart for an
            image.

    Example:
        >>> scores, coords = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0, 0], [512, 256]])
        >>> score_map(scores, coords, patch_px=256).shape
        (2, 3, 2)
    """
    if len(scores) == 0 or len(scores) != len(coords_px) or patch_px < 1:
        raise ValueError(
            f"{len(scores)} scores and {len(coords_px)} coordinates of patches of {patch_px} px; "
            "expected equally many of both, and at least one"
        )
    offsets = coords_px - coords_px.min(axis=0)
    step = _grid_step(offsets, patch_px)
    places = offsets // step
    span = max(1, patch_px // step)
    columns, rows = (places.max(axis=0) + span).tolist()
    if rows * columns > _MAX_CELLS:
        raise ValueError(
            f"the patches span {columns} x {rows} steps of {step} px; at most {_MAX_CELLS} cells "
            "are drawn: check the coordinates and their frame"
        )
    total = np.zeros((rows, columns, scores.shape[1]))
    count = np.zeros((rows, columns, 1))
    for (column, row), score in zip(places, scores, strict=True):
        total[row : row + span, column : column + span] += score
        count[row : row + span, column : column + span] += 1
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_score_maps(
    path: StrPath,
    scores: NDArray[np.floating[Any]],
    layout: Layout,
    classes: Sequence[str],
    title: str = "",
) -> None:
    """Writes a PNG with a map per class and one of the most probable class.

    Args:
        path: The file to write.
        scores: Probabilities `(N, C)`.
        layout: Positions of the patches.
        classes: Names of the classes.
        title: Title above all maps.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    cells = score_map(scores, layout.coords_px, layout.patch_px)
    note = "" if layout.is_known else " (positions unknown: patches in the order of their numbers)"
    figure, (axes,) = draw_maps(
        {_wrap(f"{index}: {name}"): cells[..., index] for index, name in enumerate(classes)},
        limits=(0, 1),
        colours="viridis",
        title=f"{title}{note}",
        width=3.2 * (len(classes) + 1),
        num_spare=1,
    )
    empty = np.isnan(cells[..., 0])
    likeliest = np.where(empty, np.nan, np.argmax(np.nan_to_num(cells), axis=-1))
    palette = ListedColormap(
        [colormaps["tab10" if len(classes) <= 10 else "tab20"](i) for i in range(len(classes))]
    )
    colours = axes.imshow(likeliest, vmin=-0.5, vmax=len(classes) - 0.5, cmap=palette)
    axes.set_title("most probable class", fontsize=7)
    bar = figure.colorbar(colours, ax=axes, shrink=0.7, ticks=range(len(classes)))
    bar.ax.set_yticklabels([str(index) for index in range(len(classes))], fontsize=6)
    save_figure(figure, path)


def find_patches(folder: StrPath) -> dict[str, list[str]]:
    """Lists the patches of a folder by slide, the part of their names before the first `_`.

    Raises:
        FileNotFoundError: If the folder does not exist or has no patches.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of patches")
    slides: dict[str, list[str]] = {}
    for path in folder.iterdir():
        slide, underscore, _ = path.name.partition("_")
        if underscore and slide and path.suffix.lower() in IMAGE_SUFFIXES:
            slides.setdefault(slide, []).append(path.name)
    if not slides:
        raise FileNotFoundError(f"{folder}: no images with names <slide>_<number>.<suffix>")
    return {slide: sorted(slides[slide], key=_natural) for slide in sorted(slides)}


def layout_from_names(names: Sequence[str], patch_px: int) -> Layout:
    """Reads positions from names `<slide>_<x>_<y>.<suffix>`; arranges others in rows by number."""
    found = [re.search(r"_(\d+)_(\d+)\.\w+$", name) for name in names]
    places = [(int(match[1]), int(match[2])) for match in found if match]
    if len(places) == len(names) and len(set(places)) > 1:
        return Layout(tuple(names), np.array(places, dtype=np.int64), patch_px)
    columns = math.ceil(math.sqrt(len(names)))
    made_up = [(i % columns * patch_px, i // columns * patch_px) for i in range(len(names))]
    return Layout(tuple(names), np.array(made_up, dtype=np.int64), patch_px, is_known=False)


def layout_from_h5(path: StrPath, names: Sequence[str], patch_px: int | None = None) -> Layout:
    """Reads the positions from a coordinates file of a slide, in level-0 pixels.

    Args:
        path: The file, in TRIDENT's format.
        names: File names of the patches, in the order of the rows.
        patch_px: Side of a patch in level-0 pixels; by default the attribute `patch_size_level0`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If there are no coordinates, or not as many as patches.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of coordinates")
    with h5py.File(path) as file:
        if "coords" not in file:
            raise ValueError(f"{path}: expected a dataset `coords`, found {sorted(file)}")
        coords = np.asarray(file["coords"], dtype=np.int64)
        side = patch_px or file["coords"].attrs.get("patch_size_level0")
    if side is None:
        raise ValueError(f"{path}: no attribute patch_size_level0; give the side of a patch")
    if coords.shape != (len(names), 2):
        raise ValueError(
            f"{path}: coordinates of shape {coords.shape}, but the slide has {len(names)} patches"
        )
    return Layout(tuple(names), coords, int(side))


def layouts_from_csv(
    path: StrPath, slides: Mapping[str, Sequence[str]], patch_px: int
) -> dict[str, Layout]:
    """Reads a table with the columns `name`, `x` and `y`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If columns or patches are missing, or a cell is not a number.
    """
    places: dict[str, tuple[int, int]] = {}
    for line, row in read_csv(path, columns=("name", "x", "y")):
        try:
            places[row["name"]] = int(float(row["x"])), int(float(row["y"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{line}: expected two numbers") from error
    layouts = {}
    for slide, names in slides.items():
        missing = [name for name in names if name not in places]
        if missing:
            raise ValueError(f"{path}: no coordinates of {missing[0]} ({len(missing)} missing)")
        coords = np.array([places[name] for name in names], dtype=np.int64)
        layouts[slide] = Layout(tuple(names), coords, patch_px)
    return layouts


def _grid_step(offsets: NDArray[np.int64], patch_px: int) -> int:
    """Returns the step of the grid: the greatest common divisor of all offsets and the patch."""
    common = int(np.gcd.reduce(np.append(offsets.ravel(), 0)))
    common = math.gcd(common, patch_px) if common else patch_px
    # Positions off a grid would give a step of a single pixel.
    return common if common >= max(1, patch_px // 16) else max(1, patch_px // 4)


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _wrap(name: str, width: int = 28) -> str:
    return "\n".join(textwrap.wrap(name, width))

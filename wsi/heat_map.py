"""Scores of the patches of a slide as an image in register with the slide, and as GeoJSON.

A picture of scores shows what is where; software needs values and positions. The OME-TIFF covers
the whole slide from its top left corner and states its resolution, so that a viewer lays it over
the slide. It has a channel per score, in 32-bit floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathcore.extras import says_extra
from pathcore.figures import draw_maps, save_figure
from pathcore.files import StrPath, atomic_file
from wsi.geojson import square_features, write_geojson
from wsi.report import distinct_colours
from wsi.store import slide_px_of

MapFormat = Literal["png", "geojson", "ome-tiff"]

MAP_SUFFIXES: dict[MapFormat, str] = {
    "png": ".png",
    "geojson": ".geojson",
    "ome-tiff": ".ome.tif",
}

_CELLS_PER_PATCH = 8
_MAX_SIDE_PX = 8192
_MAX_PICTURE_PX = 2048
_TILE_PX = 256
_SMALLEST_LEVEL_PX = 512


@dataclass(frozen=True)
class PatchScores:
    """Scores of the patches of a slide.

    Attributes:
        name: Id of the slide.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of a patch in level-0 pixels.
        scores: Numbers `(N,)` by name.
        classes: Class of each patch; None if there are no classes.
        slide_size: Width and height of the slide in level-0 pixels; by default as far as patches
            extend.
        mpp_level0: Micrometres per pixel at level 0; None if unknown.
    """

    name: str
    coords: NDArray[np.int64]
    size_level0: int
    scores: Mapping[str, NDArray[Any]]
    classes: Sequence[str] | None = None
    slide_size: tuple[int, int] | None = None
    mpp_level0: float | None = None

    @classmethod
    def with_attributes(
        cls,
        name: str,
        coords: NDArray[np.int64],
        size_level0: int,
        scores: Mapping[str, NDArray[Any]],
        attributes: Mapping[str, Any],
        classes: Sequence[str] | None = None,
    ) -> PatchScores:
        """Takes size and resolution of the slide from the attributes of a coordinates file."""
        size = slide_px_of(attributes)
        mpp = float(attributes["mpp_level0"]) if "mpp_level0" in attributes else None
        return cls(name, coords, size_level0, scores, classes, slide_size=size, mpp_level0=mpp)


def write_score_map(folder: StrPath, scores: PatchScores, map_format: MapFormat) -> Path:
    """Writes `FOLDER/NAME.png`, `.geojson` or `.ome.tif`, atomically; returns the path."""
    path = Path(folder) / f"{scores.name}{MAP_SUFFIXES[map_format]}"
    if map_format == "geojson":
        kinds = sorted(set(scores.classes or ()))
        features = square_features(
            scores.coords,
            scores.size_level0,
            scores.name,
            classes=scores.classes,
            colours=dict(zip(kinds, distinct_colours(len(kinds)), strict=True)),
            measurements=scores.scores,
        )
        write_geojson(path, features)
    elif map_format == "ome-tiff":
        write_ome_tiff(path, scores)
    else:
        write_picture(path, scores)
    return path


def write_picture(path: StrPath, scores: PatchScores) -> None:
    """Draws a PNG with a panel per score, all on one scale of colours."""
    origin = scores.coords.min(axis=0)
    extent = scores.coords.max(axis=0) - origin + scores.size_level0
    columns = [np.asarray(column, np.float64) for column in scores.scores.values()]
    values, covered = paint_scores(
        scores.coords - origin,
        np.stack(columns, axis=1),
        scores.size_level0,
        extent.tolist(),
        min(_CELLS_PER_PATCH / scores.size_level0, _MAX_PICTURE_PX / extent.max()),
    )
    shown = np.where(covered[..., None], values, np.nan)
    with says_extra("a picture of scores", "gigapath"):
        figure, _ = draw_maps(
            {name: shown[..., index] for index, name in enumerate(scores.scores)},
            limits=(min(map(np.min, columns)), max(map(np.max, columns))),
            colours="inferno",
            title=scores.name,
            width=3.2 * len(columns) + 0.8,
        )
    save_figure(figure, path)


def write_ome_tiff(path: StrPath, scores: PatchScores) -> None:
    """Writes a tiled, pyramidal OME-TIFF with a channel per score; 0 where there is no patch.

    A patch spans 8 pixels, or fewer if the image would be larger than 8192 px. Coarser levels are
    SubIFDs, and each of their pixels is one of the finer level, so that no value is made up.
    """
    extent = scores.slide_size or tuple((scores.coords.max(axis=0) + scores.size_level0).tolist())
    scale = min(_CELLS_PER_PATCH / scores.size_level0, _MAX_SIDE_PX / max(extent), 1.0)
    values, _ = paint_scores(
        scores.coords,
        np.stack([np.asarray(column, np.float64) for column in scores.scores.values()], axis=1),
        scores.size_level0,
        extent,
        scale,
    )
    channels = np.ascontiguousarray(np.moveaxis(values, 2, 0), dtype=np.float32)
    levels = [channels]
    while max(levels[-1].shape[1:]) > _SMALLEST_LEVEL_PX:
        levels.append(np.ascontiguousarray(levels[-1][:, ::2, ::2]))
    metadata: dict[str, Any] = {"axes": "CYX", "Channel": {"Name": list(scores.scores)}}
    options: dict[str, Any] = {
        "tile": (_TILE_PX, _TILE_PX),
        "compression": "zlib",
        "photometric": "minisblack",
    }
    if scores.mpp_level0:
        size_um = scores.mpp_level0 / scale
        metadata |= {f"PhysicalSize{axis}": size_um for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        options |= {"resolution": (1e4 / size_um, 1e4 / size_um), "resolutionunit": "CENTIMETER"}
    with atomic_file(path) as partial, tifffile.TiffWriter(partial, ome=True) as tiff:
        tiff.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        options.pop("resolution", None)
        options.pop("resolutionunit", None)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **options)


def paint_scores(
    coords: NDArray[np.int64],
    scores: NDArray[np.float64],
    size_level0: int,
    extent: Sequence[int],
    scale: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Paints scores onto a canvas, averaging where patches overlap.

    Args:
        coords: int64 `(N, 2)`, left and top in level-0 pixels from the corner of the canvas.
        scores: float64 `(N, C)`.
        size_level0: Side of a patch in level-0 pixels.
        extent: Width and height of the canvas in level-0 pixels.
        scale: Pixels of the canvas per level-0 pixel.

    Returns:
        Mean scores `(height, width, C)`, 0 where there is no patch, and a mask `(height, width)` of
        the pixels that a patch covers.
    """
    width, height = np.maximum(1, np.ceil(np.asarray(extent) * scale).astype(int))
    total, count = np.zeros((height, width, scores.shape[1])), np.zeros((height, width, 1))
    starts = np.floor(coords * scale).astype(int)
    ends = np.maximum(starts + 1, np.floor((coords + size_level0) * scale).astype(int))
    starts, ends = np.maximum(starts, 0), np.maximum(ends, 0)
    for (left, top), (right, bottom), row in zip(starts, ends, scores, strict=True):
        total[top:bottom, left:right] += row
        count[top:bottom, left:right] += 1
    return total / np.maximum(count, 1), count[..., 0] > 0

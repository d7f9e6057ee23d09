"""Attention heat maps: one square per tile, coloured by the rank of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from gigapath.finetune.bags import SlideFolder
from gigapath.finetune.mil import MILModel
from pathcore.files import StrPath, atomic_file
from wsi.heat_map import MAP_SUFFIXES, MapFormat, PatchScores, paint_scores, write_score_map
from wsi.store import read_attributes

CELL_PX = 8
MAX_SIDE_PX = 4096
"""Longest side of a picture; the cells of larger slides shrink below `CELL_PX`."""


@torch.inference_mode()
def draw_attention_maps(
    model: MILModel,
    weights: Path,
    folder: SlideFolder,
    slides: Sequence[str],
    out: Path,
    device: torch.device,
    formats: Sequence[MapFormat] = ("png",),
) -> None:
    """Writes the attention of a trained model over each slide into `out/SLIDE.png`.

    GeoJSON and OME-TIFF contain the attention and its rank from 0 to 1.

    Args:
        model: A model with attention; takes the weights.
        weights: Its `model.safetensors`.
        folder: Tile embeddings with coordinates.
        slides: Ids; a sample of several slides has maps of each.
        out: Output folder; files that are already there are kept.
        device: Device to run on.
        formats: Formats of the maps.
    """
    model.load_state_dict(load_file(weights))
    model.to(device).eval()
    out.mkdir(exist_ok=True)
    # Without a grid: the slide encoder's shift onto its grid would misplace the squares.
    folder = replace(folder, needs_coords=True, cell_px=None)
    for slide in slides:
        files = folder.files(slide)
        missing = {
            file: [f for f in formats if not (out / f"{file.stem}{MAP_SUFFIXES[f]}").is_file()]
            for file in files
        }
        if not any(missing.values()):
            continue
        attention = model.heat(model(folder.read(slide).features.to(device))).cpu().numpy()
        start = 0
        for file in files:
            coords = folder.read(file.stem).coords.numpy()
            attributes = read_attributes(file) if file.suffix == ".h5" else {}
            own = attention[start : start + len(coords)]
            start += len(coords)
            scores = PatchScores.with_attributes(
                file.stem,
                coords,
                patch_size_level0(attributes, coords),
                {"attention": own, "attention rank": ranks(own)},
                attributes,
            )
            for map_format in missing[file]:
                if map_format == "png":
                    draw_attention(coords, own, attributes, out / f"{file.stem}.png")
                else:
                    write_score_map(out, scores, map_format)


def draw_attention(
    coords: NDArray[np.int64],
    attention: NDArray[Any],
    attributes: dict[str, Any],
    out: StrPath,
) -> None:
    """Draws one heat map as PNG.

    Colours show the rank of a tile among all tiles of the slide, from dark to bright, because
    softmax weights over thousands of tiles differ by orders of magnitude. Overlapping tiles are
    averaged; everything else is transparent.

    Args:
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        attention: `(N,)`.
        attributes: Attributes of the coordinates, which give the size of a tile.
        out: The PNG.
    """
    # matplotlib takes a second to import, and most runs draw no maps.
    from matplotlib import colormaps

    size_level0 = patch_size_level0(attributes, coords)
    values, covered = attention_grid(coords, ranks(attention), size_level0)
    pixels = (colormaps["inferno"](values) * 255).astype(np.uint8)
    pixels[~covered] = 0
    with atomic_file(Path(out)) as partial, partial.open("wb") as stream:
        Image.fromarray(pixels).save(stream, "PNG")


def ranks(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Returns ranks from 0 to 1; ties share their mean rank."""
    from scipy.stats import rankdata

    if len(scores) == 1:
        return np.ones(1)
    found = (rankdata(scores) - 1) / (len(scores) - 1)
    return np.asarray(found, dtype=np.float64)


def attention_grid(
    coords: NDArray[np.int64], scores: NDArray[np.float64], size_level0: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Paints scores onto a canvas, averaging where tiles overlap.

    Args:
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        scores: `(N,)`.
        size_level0: Side of a tile in level-0 pixels.

    Returns:
        Mean score of each pixel `(height, width)`, and a mask of the pixels that a tile covers.
    """
    origin = coords.min(axis=0)
    extent = (coords.max(axis=0) - origin) + size_level0
    scale = min(CELL_PX / size_level0, MAX_SIDE_PX / extent.max())
    values, covered = paint_scores(
        coords - origin, scores[:, None], size_level0, extent.tolist(), scale
    )
    return values[..., 0], covered


def patch_size_level0(attributes: dict[str, Any], coords: NDArray[np.int64]) -> int:
    """Returns the side of a tile in level-0 pixels, or the smallest step between two tiles."""
    if "patch_size_level0" in attributes:
        return int(attributes["patch_size_level0"])
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return int(steps.min()) if len(steps) else 1

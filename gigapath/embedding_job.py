"""Slides to tile embeddings and slide embeddings: many of them, in parallel, resumable.

`OUT/` holds, for every slide, `coords/`, `features/ENCODER/`, `slide_features/ENCODER-PRESET/`,
`thumbnails/`, `overlays/` and `pictures/`, and for all of them `slide_embeddings.npz`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gigapath.embedding_workers import load_slide_encoder, load_tile_encoder, worker_device
from gigapath.figures import draw_folder, draw_slide, principal_colours
from gigapath.slide_vectors import (
    SlideEncoderSpec,
    check_slide,
    slide_vector,
    write_slide_vector,
)
from gigapath.tile_embedding import PART_TILES, EmbeddingError, TileEmbeddings, embed_tiles
from gigapath.tile_images import FolderTiles, SlideTiles, Tiles
from gigapath.tile_inference import TileEncoderSpec
from pathcore.files import StrPath, atomic_file
from pathcore.jobs import WRITTEN, JobFolder, Report, UnitError
from pathcore.pool import Engine
from wsi.reader import Slide
from wsi.report import draw_patches, save_jpeg
from wsi.slide_job import SlideUnit, process_slides
from wsi.store import read_attributes, read_coordinates, write_coordinates
from wsi.tile_job import THUMBNAIL_PX, slide_mask
from wsi.tiling import PatchSpec, tile

TABLE_NAME = "slide_embeddings.npz"
DAMAGED = "tiles that cannot be read"

_FOLDERS = ("coords", "overlays", "thumbnails", "pictures")


class NoTilesError(UnitError):
    """A slide without tissue."""

    reason = "no tissue"


@dataclass(frozen=True)
class EmbeddingSettings:
    """What to embed and how.

    Attributes:
        tile_encoder: The tile encoder.
        slide_encoder: The slide encoder; None stops at the tiles.
        spec: The tiles to place on slides.
        slide_mpp: Micrometres per pixel of all slides, in place of what they say.
        masks: Folder with a mask per slide; None finds tissue by Otsu's threshold.
        coords: Folder with a coordinates file per slide, instead of placing tiles.
        batch_size: Tiles embedded at once.
        pictures: Whether to draw.
    """

    tile_encoder: TileEncoderSpec
    slide_encoder: SlideEncoderSpec | None
    spec: PatchSpec
    slide_mpp: float | None = None
    masks: str | None = None
    coords: str | None = None
    batch_size: int = 64
    pictures: bool = True


@dataclass(frozen=True)
class Placement:
    """Where the work is done, which does not change what comes out.

    Attributes:
        device: None for a GPU where there is one.
        read_workers: Processes that read ahead for each slide under way; 0 is a thread.
        own_gpu: Whether each process is to take a GPU of its own.
        tile_bar: Whether to show a bar of each slide's tiles.
    """

    device: str | None = None
    read_workers: int = 0
    own_gpu: bool = False
    tile_bar: bool = False


def embed_slides(
    slides: StrPath,
    out: StrPath,
    settings: EmbeddingSettings,
    placement: Placement | None = None,
    *,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Embeds every slide of a folder; see the head of this module for the output.

    Args:
        slides: A slide, a folder of tiles (`01581x_25327y.png`), or a folder of both.
        out: Folder to write; a job that was stopped continues in it.
        settings: What to embed and how.
        placement: Where to compute.
        workers: See `wsi.slide_job.process_slides`, as for the arguments below.
        engine: `process` or `ray`.
        address: Address of a Ray cluster.
        retry_skipped: Whether to process slides again that an earlier run skipped.
        progress: Whether to show a progress bar.

    Returns:
        The report; `incomplete` counts the slides of which tiles could not be read.

    Raises:
        FileNotFoundError: If `slides` does not exist or holds neither slides nor tiles.
        OutputExistsError: If `out` holds something else.
        FolderInUseError: If another run is writing to `out`.
    """
    placement = placement or Placement()
    on_gpu = (placement.device or "").startswith("cuda")
    placement = replace(
        placement,
        own_gpu=placement.device == "cuda" and engine == "process",
        tile_bar=progress and workers == 1 and engine == "process",
    )
    return process_slides(
        partial(_embed, settings=settings, placement=placement),
        slides,
        out,
        {"operation": "embed", **asdict(settings)},
        folders=_FOLDERS if settings.pictures else _FOLDERS[:1],
        exclude=[settings.masks, settings.coords],
        tile_folders=True,
        at_end=None if settings.slide_encoder is None else _write_table,
        workers=workers,
        engine=engine,
        address=address,
        gpus_per_task=1 if on_gpu else 0,
        retry_skipped=retry_skipped,
        progress=progress,
    )


@dataclass(frozen=True)
class _SlideWork:
    """A slide and how to embed it."""

    name: str
    record: str
    path: Path
    out: Path
    settings: EmbeddingSettings
    placement: Placement


def _embed(unit: SlideUnit, settings: EmbeddingSettings, placement: Placement) -> dict[str, Any]:
    name = unit.slide_id
    task = _SlideWork(name, unit.record, unit.path, unit.out, settings, placement)
    row: dict[str, Any] = {}
    if task.path.is_dir():
        folder = FolderTiles.find(task.path)
        tiles, attributes = _check(folder, settings), {"name": name}
        embedded = _embed_tiles(tiles, name, attributes, task)
        if settings.pictures:
            colours = principal_colours(embedded.features)
            picture = draw_folder(folder, embedded.coords, colours)
            save_jpeg(picture, task.out / "pictures" / f"{name}.jpg")
    else:
        with Slide(task.path, mpp=settings.slide_mpp) as slide:
            tiles, attributes = _place(slide, name, task)
            row |= {"mpp_level0": slide.known_mpp}
            embedded = _embed_tiles(_check(tiles, settings), name, attributes, task)
            if settings.pictures:
                colours = principal_colours(embedded.features)
                picture = draw_slide(slide, embedded.coords, tiles.size_level0, colours)
                save_jpeg(picture, task.out / "pictures" / f"{name}.jpg")
    if settings.slide_encoder is not None:
        row["slide_features"] = _embed_slide(embedded, tiles.size_level0, name, task)
    return {
        **row,
        "features": _features_path(name, settings),
        "tiles": len(embedded.coords),
        "size_level0": tiles.size_level0,
        "damaged": embedded.num_damaged,
        "incomplete": [DAMAGED] if embedded.num_damaged else [],
    }


def _place(slide: Slide, name: str, task: _SlideWork) -> tuple[SlideTiles, dict[str, Any]]:
    """The tiles of a slide; writes their coordinates and pictures."""
    settings, out = task.settings, task.out
    path, mask = out / "coords" / f"{name}.h5", None
    if settings.coords is not None:
        source = _find_coords(Path(settings.coords), task.name)
        given, attributes = read_coordinates(source), read_attributes(source)
        coords, size, tile_px = given.coords, given.size_level0, given.patch_px
        coords = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
        _check_inside(coords, size, slide, source)
    else:
        mask = slide_mask(slide, settings.masks, name=name)
        tiling = tile(slide, settings.spec, mask)
        coords, size, tile_px = tiling.coords, tiling.size_level0, settings.spec.patch_px
        write_coordinates(path, slide, tiling, name=name)
        attributes = read_attributes(path)
    if settings.pictures:
        save_jpeg(draw_patches(slide, coords, size, mask=mask), out / "overlays" / f"{name}.jpg")
        save_jpeg(slide.thumbnail(THUMBNAIL_PX), out / "thumbnails" / f"{name}.jpg")
    return SlideTiles(slide.path, coords, size, tile_px, name), attributes


def _check(tiles: Any, settings: EmbeddingSettings) -> Any:
    """Finds what the slide encoder would refuse before hours go into its tiles."""
    if not len(tiles.coords):
        raise NoTilesError(f"{tiles.name}: no tile holds enough tissue")
    if settings.slide_encoder is not None:
        check_slide(tiles.coords, tiles.size_level0, settings.slide_encoder, tiles.name)
    return tiles


def _embed_tiles(
    tiles: Tiles, name: str, attributes: dict[str, Any], task: _SlideWork
) -> TileEmbeddings:
    settings, placement = task.settings, task.placement
    device = worker_device(placement.device, task.out if placement.own_gpu else None)
    spec = settings.tile_encoder
    return embed_tiles(
        tiles,
        load_tile_encoder(spec, device),
        task.out / _features_path(name, settings),
        task.out / ".job" / "parts" / task.record,
        name=spec.name,
        weights_sha256=spec.digest,
        attributes=attributes,
        batch_size=settings.batch_size,
        part_tiles=PART_TILES,
        workers=placement.read_workers,
        progress=placement.tile_bar,
    )


def _embed_slide(embedded: TileEmbeddings, size_level0: int, name: str, task: _SlideWork) -> str:
    spec = task.settings.slide_encoder
    assert spec is not None
    device = worker_device(task.placement.device, task.out if task.placement.own_gpu else None)
    model = load_slide_encoder(spec, device)
    vector = slide_vector(model, embedded.features, embedded.coords, size_level0, spec, name)
    path = f"slide_features/{spec.name}-{spec.preset}/{name}.h5"
    details = {"name": name, "num_tiles": len(embedded.coords), "size_level0": size_level0}
    details["tile_encoder"] = task.settings.tile_encoder.name
    write_slide_vector(task.out / path, vector, spec, details)
    return path


def _write_table(job: JobFolder) -> None:
    """Joins the vectors of all slides, in the order of their names."""
    names, vectors = [], []
    written = (row for row in job.rows() if row["state"] == WRITTEN)
    for row in sorted(written, key=lambda row: str(row["slide"])):
        with h5py.File(job.out / row["slide_features"], "r") as file:
            vectors.append(np.asarray(file["features"]))
        names.append(row["slide"])
    if vectors:
        with atomic_file(job.out / TABLE_NAME) as partial, partial.open("wb") as file:
            np.savez(file, slides=np.array(names), features=np.stack(vectors))


def _find_coords(folder: Path, slide_id: str) -> Path:
    for name in (f"{slide_id}.h5", f"{slide_id}_patches.h5"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: no coordinates {slide_id}.h5 or {slide_id}_patches.h5")


def _check_inside(coords: NDArray[np.int64], size: int, slide: Slide, source: Path) -> None:
    outside = ((coords >= slide.dimensions) | (coords + size <= 0)).any(axis=1)
    if outside.any():
        x, y = coords[int(outside.argmax())].tolist()
        raise EmbeddingError(
            f"coordinates {source}: {int(outside.sum())} of {len(coords)} tiles lie outside the "
            f"slide of {slide.dimensions[0]} x {slide.dimensions[1]} px, the first at ({x}, {y}): "
            "level-0 pixels, x before y, expected"
        )


def _features_path(name: str, settings: EmbeddingSettings) -> str:
    return f"features/{settings.tile_encoder.name}/{name}.h5"

"""Slides to tile embeddings and slide embeddings: many of them, in parallel, resumable.

`OUT/` holds, for every slide, `coords/`, `features/ENCODER/`, `slide_features/ENCODER-PRESET/`,
`thumbnails/`, `overlays/` and `pictures/`, and for all of them `slide_embeddings.npz`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath.embedding_workers import load_slide_encoder, load_tile_encoder, worker_device
from gigapath.slide_vectors import (
    SlideEncoderSpec,
    check_slide,
    slide_vector,
    write_slide_vector,
)
from gigapath.tile_embedding import PART_TILES, EmbeddingError, TileEmbeddings, embed_tiles
from gigapath.tile_images import FolderTiles, SlideTiles, Tiles, is_tile_folder
from gigapath.tile_inference import TileEncoderSpec
from pathcore.files import UnsafeNameError, atomic_file, check_name
from wsi.engines import Engine, ProgressBar, run_tasks
from wsi.manifest import SKIPPED, WRITTEN, JobFolder, Report, write_record
from wsi.reader import ResolutionError, Slide, SlideError
from wsi.report import draw_patches, save_jpeg
from wsi.slide_listing import SlideListing
from wsi.store import read_attributes, read_coordinates, write_coordinates
from wsi.tile_job import MaskMissingError, slide_mask, unit_name
from wsi.tiling import PatchSpec, tile

TABLE_NAME = "slide_embeddings.npz"
NO_TILES, DAMAGED = "no tissue", "tiles that cannot be read"

_FOLDERS = ("coords", "overlays", "thumbnails", "pictures")
_THUMBNAIL_PX = 1024
_NAME_ROOM_BYTES = 40


class NoTilesError(ValueError):
    """A slide without tissue."""


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


@dataclass(frozen=True)
class EmbeddingTask:
    """One slide, or one folder of tiles."""

    slide_id: str
    path: Path | str
    out: Path
    settings: EmbeddingSettings
    placement: Placement


def embed_slides(
    slides: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: EmbeddingSettings,
    placement: Placement | None = None,
    *,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Embeds every slide of a folder; see the head of this module.

    Args:
        slides: A slide, a folder of slides, a folder of tiles (`01581x_25327y.png`), or a folder
            of such folders.
        out: Folder to write; a job that was stopped continues in it.
        settings: What to embed and how.
        placement: Where.
        workers: Slides at a time.
        engine: `process` or `ray`.
        address: Of a Ray cluster; all its machines must see the files under the same paths.
        retry_skipped: Try again what an earlier run left out.
        progress: Show rate and time left.

    Returns:
        How many slides were embedded, and which were left out and why.

    Raises:
        FileNotFoundError: No such folder, or no slide in it.
        OutputExistsError: `out` holds something else.
        FolderInUseError: Another run is writing to `out`.
    """
    found = find_slides(Path(slides))
    placement = placement or Placement()
    on_gpu = (placement.device or "").startswith("cuda")
    placement = replace(
        placement,
        own_gpu=placement.device == "cuda" and engine == "process",
        tile_bar=progress and workers == 1 and engine == "process",
    )
    inputs = {"operation": "embed", **asdict(settings)}
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        for name in _FOLDERS if settings.pictures else _FOLDERS[:1]:
            (job.out / name).mkdir(exist_ok=True)
        done = job.done()
        tasks = (
            EmbeddingTask(slide_id, path, job.out, settings, placement)
            for slide_id, path in found.items()
            if unit_name(slide_id) not in done
        )
        results = run_tasks(
            embed_one_slide,
            tasks,
            workers=workers,
            engine=engine,
            address=address,
            gpus_per_task=1 if on_gpu else 0,
        )
        with ProgressBar(
            total=len(found), initial=len(done), unit="slide", disable=not progress
        ) as bar:
            for _ in results:
                bar.update()
        _write_table(job, settings)
        return job.finish()


def find_slides(path: Path) -> dict[str, Path | str]:
    """Finds slides or folders of tiles; by id the path, or why there is none.

    Raises:
        FileNotFoundError: There is nothing of the kind.
    """
    path = Path(os.path.abspath(path))
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise FileNotFoundError(f"slides {path}: no such file or folder")
    if is_tile_folder(path):
        return {path.name: path}
    folders = [child for child in sorted(path.iterdir()) if child.is_dir()]
    if tiled := {child.name: child for child in folders if is_tile_folder(child)}:
        return dict(tiled)
    listing = SlideListing(path)
    if not len(listing):
        raise FileNotFoundError(
            f"slides {path}: neither a slide nor a tile like 01581x_25327y.png in this folder"
        )
    return listing.find(listing.ids)


def embed_one_slide(task: EmbeddingTask) -> dict[str, Any]:
    """Embeds a slide and records what became of it.

    Returns:
        The head of its record.

    Raises:
        OSError: The output cannot be written.
    """
    row: dict[str, Any] = {"slide": task.slide_id}
    try:
        row |= {"state": WRITTEN, **_embed(task)}
    except ValueError as error:  # the slide, its resolution or its tiles; not the output
        row |= {"state": SKIPPED, "reason": _reason(error), "detail": str(error)}
    return write_record(task.out, unit_name(task.slide_id), [row])


def _embed(task: EmbeddingTask) -> dict[str, Any]:
    if isinstance(task.path, str):
        raise SlideError(task.path)
    name, settings = check_name(task.slide_id, room_bytes=_NAME_ROOM_BYTES), task.settings
    row: dict[str, Any] = {}
    if task.path.is_dir():
        folder = FolderTiles.find(task.path)
        tiles, attributes = _check(folder, settings), {"name": name}
        embedded = _embed_tiles(tiles, name, attributes, task)
        if settings.pictures:
            from gigapath.figures import draw_folder, principal_colours

            colours = principal_colours(embedded.features)
            picture = draw_folder(folder, embedded.coords, colours)
            save_jpeg(picture, task.out / "pictures" / f"{name}.jpg")
    else:
        with Slide(task.path, mpp=settings.slide_mpp) as slide:
            tiles, attributes = _place(slide, name, task)
            row |= {"mpp_level0": slide.known_mpp}
            embedded = _embed_tiles(_check(tiles, settings), name, attributes, task)
            if settings.pictures:
                from gigapath.figures import draw_slide, principal_colours

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
        "notes": [DAMAGED] if embedded.num_damaged else [],
    }


def _place(slide: Slide, name: str, task: EmbeddingTask) -> tuple[SlideTiles, dict[str, Any]]:
    """The tiles of a slide; writes their coordinates and pictures."""
    settings, out = task.settings, task.out
    path, mask = out / "coords" / f"{name}.h5", None
    if settings.coords is not None:
        source = _find_coords(Path(settings.coords), task.slide_id)
        given, attributes = read_coordinates(source), read_attributes(source)
        coords, size, tile_px = given.coords, given.size_level0, given.patch_px
        coords = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
        _check_inside(coords, size, slide, source)
    else:
        mask = slide_mask(slide, settings.masks)
        tiling = tile(slide, settings.spec, mask)
        coords, size, tile_px = tiling.coords, tiling.size_level0, settings.spec.patch_px
        write_coordinates(path, slide, tiling)
        attributes = read_attributes(path)
    if settings.pictures:
        save_jpeg(draw_patches(slide, coords, size, mask=mask), out / "overlays" / f"{name}.jpg")
        save_jpeg(slide.thumbnail(_THUMBNAIL_PX), out / "thumbnails" / f"{name}.jpg")
    return SlideTiles(slide.path, coords, size, tile_px), attributes


def _check(tiles: Any, settings: EmbeddingSettings) -> Any:
    """Finds what the slide encoder would refuse before hours go into its tiles."""
    if not len(tiles.coords):
        raise NoTilesError(f"{tiles.name}: no tile holds enough tissue")
    if settings.slide_encoder is not None:
        check_slide(tiles.coords, tiles.size_level0, settings.slide_encoder, tiles.name)
    return tiles


def _embed_tiles(
    tiles: Tiles, name: str, attributes: dict[str, Any], task: EmbeddingTask
) -> TileEmbeddings:
    settings, placement = task.settings, task.placement
    device = worker_device(placement.device, task.out if placement.own_gpu else None)
    spec = settings.tile_encoder
    return embed_tiles(
        tiles,
        load_tile_encoder(spec, device),
        task.out / _features_path(name, settings),
        task.out / ".job" / "parts" / unit_name(task.slide_id),
        name=spec.name,
        weights_sha256=spec.digest,
        attributes=attributes,
        batch_size=settings.batch_size,
        part_tiles=PART_TILES,
        workers=placement.read_workers,
        progress=placement.tile_bar,
    )


def _embed_slide(embedded: TileEmbeddings, size_level0: int, name: str, task: EmbeddingTask) -> str:
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


def _write_table(job: JobFolder, settings: EmbeddingSettings) -> None:
    """Joins the vectors of all slides, in the order of their names."""
    import h5py

    if settings.slide_encoder is None:
        return
    names, vectors = [], []
    for row in sorted(_written(job), key=lambda row: str(row["slide"])):
        with h5py.File(job.out / row["slide_features"], "r") as file:
            vectors.append(np.asarray(file["features"]))
        names.append(row["slide"])
    if vectors:
        with atomic_file(job.out / TABLE_NAME) as partial, partial.open("wb") as file:
            np.savez(file, slides=np.array(names), features=np.stack(vectors))


def _written(job: JobFolder) -> Iterator[dict[str, Any]]:
    return (row for row in job.rows() if row["state"] == WRITTEN)


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


def _reason(error: ValueError) -> str:
    reasons = {
        NoTilesError: NO_TILES,
        ResolutionError: "resolution unknown",
        SlideError: "slide unreadable",
        UnsafeNameError: "bad id",
        MaskMissingError: "mask missing",
        EmbeddingError: "bad embeddings or coordinates",
    }
    return reasons.get(type(error), "cannot be embedded")

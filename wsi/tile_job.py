"""Coordinates of many slides: one slide after the other, in parallel, resumable."""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pathcore.files import UnsafeNameError, check_name
from wsi.engines import Engine, ProgressBar, run_tasks
from wsi.manifest import SKIPPED, WRITTEN, JobFolder, Report, write_record
from wsi.reader import ResolutionError, Slide, SlideError
from wsi.report import draw_patches, save_jpeg
from wsi.slide_listing import SlideListing
from wsi.store import CoordsStyle, write_coordinates
from wsi.tiling import PatchSpec, tile
from wsi.tissue import MASK_SIDE_PX, TissueMask, geojson_mask, image_mask, otsu_mask

COORDS_FOLDER, OVERLAYS_FOLDER, THUMBNAILS_FOLDER = "coords", "overlays", "thumbnails"

_THUMBNAIL_PX = 1024
_NAME_ROOM_BYTES = 40


class MaskMissingError(ValueError):
    """The folder of masks has none for a slide."""


@dataclass(frozen=True)
class TileSettings:
    """What to tile and how.

    Attributes:
        spec: The patches.
        masks: Folder with a mask per slide: an image or GeoJSON of the slide's name; None finds
            tissue by Otsu's threshold.
        whole_slide: Take every patch, tissue or not.
        mpp: Micrometres per pixel of all slides, in place of what they say.
        style: Of the coordinate files.
    """

    spec: PatchSpec
    masks: str | None = None
    whole_slide: bool = False
    mpp: float | None = None
    style: CoordsStyle = "trident"


@dataclass(frozen=True)
class SlideTask:
    """One slide to tile."""

    slide_id: str
    path: Path | str
    out: Path
    settings: TileSettings


def tile_slides(
    slides: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: TileSettings,
    *,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Writes coordinates, a thumbnail and a picture of the patches for every slide of a folder.

    Args:
        slides: The folder, or one slide.
        out: Folder to write; a job that was stopped continues in it.
        settings: What to tile and how.
        workers: Slides are read by so many processes.
        engine: `process` or `ray`.
        address: Of a Ray cluster; all its machines must see `slides` and `out`.
        retry_skipped: Try again what an earlier run left out.
        progress: Show rate and time left.

    Returns:
        How many slides were tiled, and which were left out and why; `notes` has the number of
        slides without tissue.

    Raises:
        FileNotFoundError: No such folder, or no slide in it.
        OutputExistsError: `out` holds something else.
        FolderInUseError: Another run is writing to `out`.
    """
    found = _find(Path(slides))
    inputs = {"operation": "tile", **asdict(settings)}
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        for name in (COORDS_FOLDER, OVERLAYS_FOLDER, THUMBNAILS_FOLDER):
            (job.out / name).mkdir(exist_ok=True)
        done = job.done()
        tasks = (
            SlideTask(slide_id, path, job.out, settings)
            for slide_id, path in found.items()
            if unit_name(slide_id) not in done
        )
        with ProgressBar(
            total=len(found), initial=len(done), unit="slide", disable=not progress
        ) as bar:
            for _ in run_tasks(
                tile_one_slide, tasks, workers=workers, engine=engine, address=address
            ):
                bar.update()
        return job.finish()


def tile_one_slide(task: SlideTask) -> dict[str, Any]:
    """Tiles a slide and records what became of it.

    Returns:
        The head of its record.

    Raises:
        OSError: The output cannot be written.
    """
    row: dict[str, Any] = {"slide": task.slide_id}
    try:
        row |= {"state": WRITTEN, **_tile(task)}
    except ValueError as error:  # the slide, its resolution or its mask; not the output
        row |= {"state": SKIPPED, "reason": _reason(error), "detail": str(error)}
    return write_record(task.out, unit_name(task.slide_id), [row])


def _tile(task: SlideTask) -> dict[str, Any]:
    if isinstance(task.path, str):
        raise SlideError(task.path)
    name = check_name(task.slide_id, room_bytes=_NAME_ROOM_BYTES)
    settings = task.settings
    with Slide(task.path, mpp=settings.mpp) as slide:
        mask = None if settings.whole_slide else slide_mask(slide, settings.masks)
        tiling = tile(slide, settings.spec, mask)
        picture = draw_patches(slide, tiling.coords, tiling.size_level0, mask=mask)
        save_jpeg(picture, task.out / OVERLAYS_FOLDER / f"{name}.jpg")
        save_jpeg(slide.thumbnail(_THUMBNAIL_PX), task.out / THUMBNAILS_FOLDER / f"{name}.jpg")
        coords_path = task.out / COORDS_FOLDER / f"{name}.h5"
        write_coordinates(coords_path, slide, tiling, style=settings.style)
        return {
            "file": f"{COORDS_FOLDER}/{name}.h5",
            "patches": len(tiling.coords),
            "size_level0": tiling.size_level0,
            "mpp_level0": slide.mpp,
            "tissue": None if mask is None else round(mask.fraction, 4),
            "notes": [] if len(tiling.coords) else ["no patches"],
        }


def slide_mask(slide: Slide, masks: str | None = None) -> TissueMask:
    """The tissue of a slide.

    Args:
        slide: The slide.
        masks: Folder with a mask per slide: an image or GeoJSON of the slide's name; None finds
            tissue by Otsu's threshold.

    Raises:
        MaskMissingError: The folder has none for the slide.
    """
    if masks is None:
        return otsu_mask(slide, max_side_px=MASK_SIDE_PX)
    folder, stem = Path(masks), slide.path.stem
    for suffix in (".geojson", ".json"):
        if (folder / f"{stem}{suffix}").is_file():
            return geojson_mask(folder / f"{stem}{suffix}", slide)
    for suffix in (".png", ".tif", ".tiff", ".jpg", ".bmp"):
        if (folder / f"{stem}{suffix}").is_file():
            return image_mask(folder / f"{stem}{suffix}", slide)
    raise MaskMissingError(f"{folder}: no mask {stem}.geojson, .json, .png or .tif")


def _find(slides: Path) -> dict[str, Path | str]:
    if slides.is_file():
        return {slides.stem: Path(os.path.abspath(slides))}
    listing = SlideListing(slides)
    if not len(listing):
        raise FileNotFoundError(f"slides {slides}: no slide in this folder")
    return listing.find(listing.ids)


def _reason(error: ValueError) -> str:
    reasons = {
        ResolutionError: "resolution unknown",
        SlideError: "slide unreadable",
        UnsafeNameError: "bad id",
        MaskMissingError: "mask missing",
    }
    return reasons.get(type(error), "cannot be tiled")


def unit_name(slide_id: str) -> str:
    """The name of a slide's record in a job."""
    # The id puts records into order; its digest tells apart what is alike once cut to a length.
    head = slide_id.encode(errors="replace")[:100].decode(errors="ignore")
    return f"{head}-{zlib.crc32(slide_id.encode(errors='surrogateescape')):08x}"

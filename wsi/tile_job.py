"""Tiles many slides and writes the coordinates of their patches, as a parallel, resumable job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from pathcore.files import StrPath
from pathcore.jobs import Report, UnitError
from pathcore.pool import PoolOptions
from wsi.artefacts import STEPS, clean_mask
from wsi.geojson import GEOJSON_SUFFIXES, square_features, tissue_features, write_geojson
from wsi.reader import Slide
from wsi.report import draw_patches, save_jpeg
from wsi.slide_job import SlideUnit, process_slides
from wsi.store import CoordsStyle, write_coordinates
from wsi.tiling import PatchSpec, Tiling, tile
from wsi.tissue import MASK_SIDE_PX, TissueMask, geojson_mask, image_mask, otsu_mask

if TYPE_CHECKING:
    from typing_extensions import Unpack

COORDS_FOLDER, OVERLAYS_FOLDER, THUMBNAILS_FOLDER = "coords", "overlays", "thumbnails"
TISSUE_FOLDER, PATCHES_FOLDER = "tissue_geojson", "patch_geojson"
THUMBNAIL_PX = 1024
DAMAGED = "tiles that cannot be read"


class MaskMissingError(UnitError):
    """Raised if a folder of masks has no mask for a slide."""

    reason = "mask missing"


@dataclass(frozen=True)
class TileSettings:
    """Settings of a tiling job.

    Attributes:
        spec: Size, resolution and selection of the patches.
        masks: Folder with a mask per slide, an image or GeoJSON named after the slide; by default
            tissue is found by Otsu's threshold.
        whole_slide: Whether to keep patches without tissue.
        mpp: Micrometres per pixel of all slides, overriding the files.
        style: Attributes of the coordinate files: `trident` or `clam`.
        level0: Whether lengths of `spec` are level-0 pixels of each slide; `spec.mpp` is ignored
            then.
        geojson: Whether to also write the outlines of tissue and patches as GeoJSON.
        clean: Steps that remove pen, blur and other artefacts from the tissue; see
            `wsi.artefacts.STEPS`.

    Raises:
        ValueError: If `style` or a step of `clean` is unknown, or `whole_slide` is combined with
            `masks` or `clean`.
    """

    spec: PatchSpec
    masks: str | None = None
    whole_slide: bool = False
    mpp: float | None = None
    style: CoordsStyle = "trident"
    level0: bool = False
    geojson: bool = False
    clean: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.style not in get_args(CoordsStyle):
            styles = " or ".join(get_args(CoordsStyle))
            raise ValueError(f"style {self.style!r}: expected {styles}")
        if unknown := [step for step in self.clean if step not in STEPS]:
            raise ValueError(f"clean: no step {unknown[0]!r}; known are {', '.join(STEPS)}")
        if self.whole_slide and (self.masks or self.clean):
            raise ValueError("whole_slide: excludes masks and clean, which find tissue")


def tile_slides(
    slides: StrPath,
    out: StrPath,
    settings: TileSettings,
    *,
    retry_skipped: bool = False,
    progress: bool = True,
    **pool: Unpack[PoolOptions],
) -> Report:
    """Writes coordinates, a thumbnail and an overlay of the patches for every slide of a folder.

    Args:
        slides: The folder, one slide, or a table of slides; see `SlideListing`.
        out: Output folder; a job that was stopped continues in it.
        settings: Settings of the job.
        retry_skipped: Whether to process slides again that an earlier run skipped.
        progress: Whether to show a progress bar.
        **pool: See `pathcore.pool.PoolOptions`; a task is a slide.

    Returns:
        The report; `notes` counts the slides without patches.

    Raises:
        FileNotFoundError: If `slides` does not exist or contains no slides.
        OutputExistsError: If `out` contains something else.
        FolderInUseError: If another run is writing to `out`.
    """
    outlines = (TISSUE_FOLDER, PATCHES_FOLDER) if settings.geojson else ()
    return process_slides(
        partial(_tile, settings=settings),
        slides,
        out,
        {"operation": "tile", **asdict(settings), "clean": list(settings.clean)},
        folders=(COORDS_FOLDER, OVERLAYS_FOLDER, THUMBNAILS_FOLDER, *outlines),
        exclude=[settings.masks],
        beside=partial(_mask_beside, settings=settings),
        retry_skipped=retry_skipped,
        progress=progress,
        **pool,
    )


def _mask_beside(unit: SlideUnit, settings: TileSettings) -> Path | None:
    return None if settings.whole_slide else find_mask(unit.mask or settings.masks, unit.slide_id)


def _tile(unit: SlideUnit, settings: TileSettings) -> dict[str, Any]:
    name, out = unit.slide_id, unit.out
    with Slide(unit.path, mpp=unit.mpp or settings.mpp) as slide:
        spec = replace(settings.spec, mpp=slide.mpp) if settings.level0 else settings.spec
        tiling, mask, changes = place_patches(
            slide,
            spec,
            unit.mask or settings.masks,
            name=name,
            whole_slide=settings.whole_slide,
            clean=settings.clean,
        )
        picture = draw_patches(
            slide, tiling.coords, tiling.size_level0, mask=mask, changes=changes or None
        )
        save_jpeg(picture, out / OVERLAYS_FOLDER / f"{name}.jpg")
        save_jpeg(slide.thumbnail(THUMBNAIL_PX), out / THUMBNAILS_FOLDER / f"{name}.jpg")
        coords_path = out / COORDS_FOLDER / f"{name}.h5"
        write_coordinates(coords_path, slide, tiling, name=name, style=settings.style)
        if settings.geojson:
            write_outlines(out, name, tiling, mask)
        return {
            "file": f"{COORDS_FOLDER}/{name}.h5",
            "patches": len(tiling.coords),
            "size_level0": tiling.size_level0,
            "mpp_level0": slide.mpp,
            "tissue": None if mask is None else round(mask.fraction, 4),
            **_cleaning(changes, slide),
            "damaged": [{"position": [x, y], "detail": why} for x, y, why in tiling.damaged],
            "incomplete": [DAMAGED] if tiling.damaged else [],
            "notes": [] if len(tiling.coords) else ["no patches"],
        }


def write_outlines(out: Path, name: str, tiling: Tiling, mask: TissueMask | None) -> None:
    """Writes the patches of a slide, and its tissue unless `mask` is None, as GeoJSON."""
    measurements = {}
    if mask is not None:
        measurements["tissue"] = mask.fractions(tiling.coords, tiling.size_level0)
        write_geojson(out / TISSUE_FOLDER / f"{name}.geojson", tissue_features(mask, name))
    patches = square_features(tiling.coords, tiling.size_level0, name, measurements=measurements)
    write_geojson(out / PATCHES_FOLDER / f"{name}.geojson", patches)


def place_patches(
    slide: Slide,
    spec: PatchSpec,
    masks: StrPath | None = None,
    *,
    name: str = "",
    whole_slide: bool = False,
    clean: Iterable[str] = (),
) -> tuple[Tiling, TissueMask | None, dict[str, NDArray[np.bool_]]]:
    """Places patches on the tissue of a slide and drops those that cannot be read.

    Args:
        slide: The slide.
        spec: Size, resolution and selection of the patches.
        masks: Mask or folder of masks, see `slide_mask`.
        name: Name of the slide, see `slide_mask`.
        whole_slide: Whether to keep patches without tissue.
        clean: Steps that clean the tissue, see `wsi.artefacts.clean_mask`.

    Returns:
        The patches; the tissue or, with `whole_slide`, None; what each step changed.

    Raises:
        SlideError: If nothing of the slide can be read.
        ValueError: If a mask cannot be used, or the slide is coarser than the patches.
    """
    mask = None if whole_slide else slide_mask(slide, masks, name=name)
    changes: dict[str, NDArray[np.bool_]] = {}
    if mask is not None and clean:
        mask, changes = clean_mask(slide, mask, clean)
    # Otsu's mask comes from an overview, in which damage was already detected.
    known = mask is not None and mask.damaged is not None
    damaged = None if known else slide.overview(MASK_SIDE_PX).damaged
    return tile(slide, spec, mask, damaged=damaged), mask, changes


def _cleaning(changes: Mapping[str, NDArray[np.bool_]], slide: Slide) -> dict[str, Any]:
    """Returns the square millimetres that each step removed, or added, for the manifest."""
    if not changes:
        return {}
    width, height = slide.dimensions
    area = width * height * slide.mpp**2 / 1e6
    sizes = {step: round(float(change.mean()) * area, 4) for step, change in changes.items()}
    added = {"added_mm2": sizes.pop("holes")} if "holes" in sizes else {}
    return {"removed_mm2": sizes, **added}


def slide_mask(slide: Slide, masks: StrPath | None = None, *, name: str = "") -> TissueMask:
    """Returns the tissue of a slide.

    Args:
        slide: The slide.
        masks: A mask, an image or GeoJSON, or a folder with a mask per slide, named after it; by
            default tissue is found by Otsu's threshold.
        name: Name of the slide; by default its file name without suffix.

    Raises:
        MaskMissingError: If the folder has no mask for the slide.
        ValueError: If the mask cannot be read or does not fit the slide.
    """
    path = find_mask(masks, name or slide.path.stem)
    if path is None:
        return otsu_mask(slide, max_side_px=MASK_SIDE_PX)
    outlines = path.name.lower().endswith(GEOJSON_SUFFIXES)
    return geojson_mask(path, slide) if outlines else image_mask(path, slide)


def find_mask(masks: StrPath | None, name: str) -> Path | None:
    """Returns the mask of a slide, see `slide_mask`; None if `masks` is None.

    Raises:
        MaskMissingError: If it does not exist.
    """
    if masks is None:
        return None
    path = Path(masks)
    if path.is_file():
        return path
    if not path.is_dir():
        raise MaskMissingError(f"mask {path}: no such file")
    for suffix in (*GEOJSON_SUFFIXES, ".png", ".tif", ".tiff", ".jpg", ".bmp"):
        if (path / f"{name}{suffix}").is_file():
            return path / f"{name}{suffix}"
    raise MaskMissingError(
        f"{path}: no mask {name}.geojson, .json (or in .gz or .zip), .png or .tif"
    )

"""Computes tile and slide embeddings of many slides, as a parallel, resumable job.

For each slide, the output folder gets one file in each of `coords/`, `features/ENCODER/`,
`slide_features/ENCODER-PRESET/`, `thumbnails/`, `overlays/` and `pictures/`. The embeddings of all
slides are joined in `slide_embeddings.npz`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from gigapath.embed.figures import draw_folder, draw_slide, principal_colours
from gigapath.embed.slide_encoders import NamedSlideEncoder, check_origin, get_slide_preset
from gigapath.embed.slide_vectors import SlideEncoderSpec, write_slide_vector
from gigapath.embed.tile_inference import (
    TileEncoderSpec,
    choose_precision,
    describe_encoder,
    open_tile_encoder,
)
from pathcore.device_claims import Placement, choose_device
from pathcore.encoders.origin import TileOrigin, stated_mpp
from pathcore.files import StrPath, atomic_file
from pathcore.jobs import WRITTEN, JobFolder, Report, UnitError
from pathcore.pool import Engine, PoolOptions
from wsi.features import (
    PART_TILES,
    FolderTiles,
    PatchEncoder,
    SlideTiles,
    TileEmbeddings,
    embed_tiles,
)
from wsi.reader import Slide, SlideError
from wsi.report import draw_patches, save_jpeg
from wsi.slide_job import SlideUnit, process_slides
from wsi.store import read_attributes, read_coordinates_of, write_coordinates
from wsi.tile_job import DAMAGED, THUMBNAIL_PX, find_mask, place_patches
from wsi.tiling import PatchSpec

MIN_TISSUE = 0.1
"""Least fraction of tissue in a tile, as in the original pipeline."""

_FOLDERS = ("coords", "overlays", "thumbnails", "pictures")


class NoTilesError(UnitError):
    """Raised if no tile of a slide contains enough tissue."""

    reason = "no tissue"


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings that determine the output of an embedding job.

    Attributes:
        tile_encoder: The tile encoder.
        slide_encoder: The slide encoder; None computes tile embeddings only. One with a
            name takes only tiles of the encoder and scale that it was trained on.
        spec: Size, resolution and selection of the tiles.
        slide_mpp: Micrometres per pixel of all slides, overriding what the files say.
        masks: Folder with a mask per slide; by default tissue is found by Otsu's threshold.
        coords: Folder with a coordinates file per slide, instead of placing tiles.
        batch_size: Number of tiles per forward pass.
        pictures: Whether to draw thumbnails, overlays and pictures of the embeddings.
        origin: Preset of the tile encoder, and what folders of tiles do not say about their tiles.
    """

    tile_encoder: TileEncoderSpec
    slide_encoder: SlideEncoderSpec | NamedSlideEncoder | None
    spec: PatchSpec
    slide_mpp: float | None = None
    masks: str | None = None
    coords: str | None = None
    batch_size: int = 64
    pictures: bool = True
    origin: TileOrigin = field(default_factory=TileOrigin)

    @classmethod
    def for_encoder(cls, name: str, **changes: Any) -> EmbeddingSettings:
        """Returns the settings that embed tiles as a tile encoder was published with.

        Args:
            name: Tile encoder, as for `describe_encoder`. Its patch size and resolution are used,
                and by default no slide encoder.
            **changes: Other attributes, such as `slide_mpp`.

        Raises:
            FileNotFoundError: If its weights are missing.
            ValueError: If the name is unknown.
        """
        device = choose_device()
        encoder = describe_encoder(name, precision=choose_precision("auto", device))
        defaults = {
            "slide_encoder": None,
            "spec": PatchSpec(encoder.patch_px, encoder.mpp, min_tissue=MIN_TISSUE),
            "origin": TileOrigin(
                name.partition("@")[0] if encoder.named else "", digest=encoder.digest
            ),
        }
        return cls(encoder, **{**defaults, **changes})

    @property
    def named_slide_encoder(self) -> NamedSlideEncoder | None:
        """The slide encoder, with an empty name for weights that have none."""
        if isinstance(self.slide_encoder, SlideEncoderSpec):
            return NamedSlideEncoder("", longnet=self.slide_encoder)
        return self.slide_encoder


def embed_slides(
    slides: StrPath,
    out: StrPath,
    settings: EmbeddingSettings | str,
    placement: Placement | None = None,
    *,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Embeds every slide of a folder; the module docstring lists the output.

    Args:
        slides: A slide, a folder of tiles (`01581x_25327y.png`), or a folder of both.
        out: Output folder; a job that was stopped continues in it.
        settings: Encoders, tiles and masks; or the name of a tile encoder, which means
            `EmbeddingSettings.for_encoder`.
        placement: Device and reading processes.
        workers: Number of processes, each of which embeds one slide at a time.
        engine: `process` or `ray`.
        address: Address of a Ray cluster.
        retry_skipped: Whether to process slides again that an earlier run skipped.
        progress: Whether to show a progress bar.

    Returns:
        The report; `incomplete` counts the slides with tiles that could not be read.

    Raises:
        FileNotFoundError: If `slides` does not exist or holds neither slides nor tiles.
        OutputExistsError: If `out` contains something else.
        FolderInUseError: If another run is writing to `out`.
    """
    if isinstance(settings, str):
        settings = EmbeddingSettings.for_encoder(settings)
    placement = (placement or Placement()).for_job(
        workers=workers, engine=engine, progress=progress
    )
    pool: PoolOptions = {
        **placement.pool,
        "workers": workers,
        "engine": engine,
        "address": address,
    }
    return process_slides(
        partial(_embed_slide, settings=settings, placement=placement),
        slides,
        out,
        {"operation": "embed", **asdict(settings)},
        folders=_FOLDERS if settings.pictures else _FOLDERS[:1],
        exclude=[settings.masks, settings.coords],
        beside=partial(_beside, settings=settings),
        tile_folders=True,
        at_end=None if settings.slide_encoder is None else write_table,
        retry_skipped=retry_skipped,
        progress=progress,
        **pool,
    )


def _embed_slide(
    unit: SlideUnit, settings: EmbeddingSettings, placement: Placement
) -> dict[str, Any]:
    name, out = unit.slide_id, unit.out
    if unit.path.is_dir():
        folder = FolderTiles.find(unit.path)
        row, embedded = _embed_tiles(folder, {"name": name}, unit, settings, placement)
        if settings.pictures:
            colours = principal_colours(embedded.features)
            picture = draw_folder(folder, embedded.coords, colours)
            save_jpeg(picture, out / "pictures" / f"{name}.jpg")
    else:
        with Slide(unit.path, mpp=unit.mpp or settings.slide_mpp) as slide:
            tiles, attributes, lost = _place(slide, unit, settings)
            row, embedded = _embed_tiles(
                tiles, attributes, unit, settings, placement, num_lost=lost
            )
            row["mpp_level0"] = slide.known_mpp
            if settings.pictures:
                colours = principal_colours(embedded.features)
                picture = draw_slide(slide, embedded.coords, tiles.size_level0, colours)
                save_jpeg(picture, out / "pictures" / f"{name}.jpg")
    return row


def _beside(unit: SlideUnit, settings: EmbeddingSettings) -> Path | None:
    """Returns the coordinates or the mask of a slide; None for folders of tiles."""
    if unit.path.is_dir():
        return None
    if settings.coords is not None:
        return _find_coords(Path(settings.coords), unit.slide_id)
    return find_mask(unit.mask or settings.masks, unit.slide_id)


def _place(
    slide: Slide, unit: SlideUnit, settings: EmbeddingSettings
) -> tuple[SlideTiles, dict[str, Any], int]:
    """Places the tiles of a slide and writes their coordinates, overlay and thumbnail.

    Returns:
        The tiles, the attributes to store with their features, and the number of tiles that were
        dropped because they cannot be read.
    """
    name, out = unit.slide_id, unit.out
    mask, num_lost = None, 0
    if settings.coords is not None:
        source = _find_coords(Path(settings.coords), name)
        given, attributes = read_coordinates_of(slide, source), read_attributes(source)
        coords, size, tile_px = given.coords, given.size_level0, given.patch_px
        if slide.known_mpp:  # TRIDENT's and CLAM's files do not say it
            scale = slide.known_mpp * size / tile_px
            attributes = {"mpp": scale, "mpp_level0": slide.known_mpp} | attributes
        # The order of the tiles affects the slide encoder, which was trained on rows.
        coords = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
    else:
        tiling, mask, _ = place_patches(
            slide, settings.spec, unit.mask or settings.masks, name=name
        )
        coords, size, tile_px = tiling.coords, tiling.size_level0, settings.spec.patch_px
        num_lost = len(tiling.damaged)
        if num_lost and not len(coords):
            raise SlideError(
                f"{name}: none of {num_lost} tiles can be read; the last: {tiling.damaged[-1][2]}"
            )
        path = out / "coords" / f"{name}.h5"
        write_coordinates(path, slide, tiling, name=name)
        attributes = read_attributes(path)
    if settings.pictures:
        save_jpeg(draw_patches(slide, coords, size, mask=mask), out / "overlays" / f"{name}.jpg")
        save_jpeg(slide.thumbnail(THUMBNAIL_PX), out / "thumbnails" / f"{name}.jpg")
    return SlideTiles(slide.path, coords, size, tile_px, name), attributes, num_lost


def _embed_tiles(
    tiles: SlideTiles | FolderTiles,
    attributes: dict[str, Any],
    unit: SlideUnit,
    settings: EmbeddingSettings,
    placement: Placement,
    *,
    num_lost: int = 0,
) -> tuple[dict[str, Any], TileEmbeddings]:
    """Embeds the tiles of a slide and the slide itself.

    Returns:
        The row of the manifest, and the tile embeddings.
    """
    name, out, spec = unit.slide_id, unit.out, settings.tile_encoder
    if not len(tiles.coords):
        raise NoTilesError(f"{tiles.name}: no tile holds enough tissue")
    slide_encoder = settings.named_slide_encoder
    if slide_encoder is not None:  # checked before the expensive tile pass
        _check_tiles(slide_encoder, tiles, attributes, settings)
    device = placement.worker_device(out)
    features_path = f"features/{spec.name}/{name}.h5"
    embedded = embed_tiles(
        tiles,
        _load_tile_encoder(spec, device),
        out / features_path,
        out / ".job" / "parts" / unit.record,
        name=spec.name,
        weights_sha256=spec.digest,
        attributes=attributes,
        batch_size=settings.batch_size,
        part_tiles=PART_TILES,
        workers=placement.read_workers,
        progress=placement.tile_bar,
    )
    num_damaged = embedded.num_damaged + num_lost
    row: dict[str, Any] = {
        "features": features_path,
        "tiles": len(embedded.coords),
        "size_level0": tiles.size_level0,
        "damaged": num_damaged,
        "incomplete": [DAMAGED] if num_damaged else [],
    }
    if slide_encoder is not None:
        vector = slide_encoder.vector(
            _load_slide_encoder(slide_encoder, device),
            embedded.features,
            embedded.coords,
            tiles.size_level0,
            name,
        )
        row["slide_features"] = f"slide_features/{slide_encoder.folder}/{name}.h5"
        details = {
            **slide_encoder.attributes(tiles.size_level0),
            "name": name,
            "num_tiles": len(embedded.coords),
            "size_level0": tiles.size_level0,
            "tile_encoder": spec.name,
        }
        write_slide_vector(out / row["slide_features"], vector, details)
    return row, embedded


def _check_tiles(
    encoder: NamedSlideEncoder,
    tiles: SlideTiles | FolderTiles,
    attributes: dict[str, Any],
    settings: EmbeddingSettings,
) -> None:
    """Checks that a slide encoder can place these tiles and, if named, was trained on such."""
    encoder.check(tiles.coords, tiles.size_level0, tiles.name)
    if not encoder.preset:
        return
    origin = settings.origin
    if isinstance(tiles, SlideTiles):
        origin = replace(origin, patch_px=tiles.tile_px, mpp=stated_mpp(attributes))
    check_origin(get_slide_preset(encoder.preset), origin, tiles.name)


# Caches of a worker process: models are loaded once, not once per slide.


@lru_cache(maxsize=1)
def _load_tile_encoder(spec: TileEncoderSpec, device: torch.device) -> PatchEncoder:
    return open_tile_encoder(spec, device)


@lru_cache(maxsize=1)
def _load_slide_encoder(encoder: NamedSlideEncoder, device: torch.device) -> Any:
    return encoder.open(device)


def write_table(job: JobFolder, noun: str = "slide") -> None:
    """Joins the embeddings of all slides or patients, sorted by name."""
    names, vectors = [], []
    path = job.out / f"{noun}_embeddings.npz"
    written = (row for row in job.rows() if row["state"] == WRITTEN)
    for row in sorted(written, key=lambda row: str(row[noun])):
        with h5py.File(job.out / row[f"{noun}_features"], "r") as file:
            vectors.append(np.asarray(file["features"]))
        names.append(row[noun])
    if not vectors:  # the table of an earlier run may be there
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as partial, partial.open("wb") as file:
        table: dict[str, Any] = {f"{noun}s": np.array(names), "features": np.stack(vectors)}
        np.savez(file, **table)


def _find_coords(folder: Path, slide_id: str) -> Path:
    for name in (f"{slide_id}.h5", f"{slide_id}_patches.h5"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: no coordinates {slide_id}.h5 or {slide_id}_patches.h5")

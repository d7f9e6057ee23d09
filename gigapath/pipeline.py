"""The published pipeline: tiles a slide, loads both encoders and runs them.

`tile_one_slide` writes tiles as images, and `run_inference_with_tile_encoder` reads such a folder.
To embed many slides without writing images, use `xtuner-add embed` (`gigapath.embed.job`).
Functions have the original's names and arguments; further arguments are keyword-only. Defects of
the original are corrected by default, and an argument selects its behaviour.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from gigapath import slide_encoder as slide_encoders
from gigapath import tile_encoder as tile_encoders
from gigapath.embed.slide_vectors import onto_slide
from gigapath.embed.tile_inference import (
    Precision,
    TileEncoder,
    autocast,
    choose_precision,
)
from gigapath.published.tiling import (
    MIN_OCCUPANCY,
    Arithmetic,
    GridTile,
    Origin,
    Tissue,
    find_tissue,
    tissue_tiles,
)
from gigapath.tile_encoder import tile_transform
from pathcore.device_claims import choose_device
from pathcore.files import StrPath, atomic_file, check_name, fsync_path, write_json
from pathcore.pool import ProgressBar
from wsi.features import FolderTiles, read_tiles
from wsi.image_codecs import encode_png
from wsi.reader import Slide, SlideError
from wsi.report import draw_patches
from wsi.slide_job import SlideUnit, slide_source

SLIDE_ARCHITECTURE = "gigapath_slide_enc12l768d"
TILE_WIDTH = 1536
"""Architecture and input width of the slide encoder that the original's pipeline loads."""

_COLUMNS = ("slide_id", "tile_id", "image", "label", "tile_x", "tile_y", "occupancy")
_TABLE, _FAILED, _SETTINGS = "dataset.csv", "failed_tiles.csv", "tiling.json"
_THUMBNAIL_PX = 1024

Order = Literal["row-major", "given"]


def tile_one_slide(
    slide_file: StrPath = "",
    save_dir: StrPath = "",
    level: int = 0,
    tile_size: int = 256,
    *,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    occupancy_threshold: float = MIN_OCCUPANCY,
    coordinates: Origin = "level0",
    arithmetic: Arithmetic = "exact",
    progress: bool = True,
) -> Path:
    """Writes the tissue tiles of a slide as images, with a table and thumbnails.

    Args:
        slide_file: The slide.
        save_dir: Output folder; receives `output/SLIDE/01581x_25327y.png`,
            `output/SLIDE/dataset.csv`, `output/SLIDE/failed_tiles.csv` and `thumbnails/`.
        level: Level of the slide to cut tiles from. The encoders expect 0.5 micrometres per pixel.
        tile_size: Side of a tile in pixels of that level.
        mpp: Resolution of the tiles in micrometres per pixel, instead of a level.
        slide_mpp: Resolution of the slide, overriding that of the file.
        occupancy_threshold: Fraction of tissue that a tile must exceed.
        coordinates: Coordinates in names and table: `level0`, or `published` with x and y of the
            tissue's corner swapped, as in the original.
        arithmetic: `exact`, or `published` for luminance and occupancy in float16, as in the
            original.
        progress: Whether to show a progress bar.

    Returns:
        The folder of the tiles. It is written completely or not at all; a complete folder of a run
        with the same settings is kept.

    Raises:
        SlideError: If the slide cannot be opened.
        ValueError: If the level does not exist, no tile has enough tissue, or the folder holds
            something else.
    """
    if not os.fspath(slide_file) or not os.fspath(save_dir):
        raise ValueError("tile_one_slide: slide_file and save_dir are needed")
    slide_file, save_dir = Path(slide_file), Path(save_dir)
    slide_id = check_name(slide_file.name, room_bytes=40)
    output, thumbnails = save_dir / "output", save_dir / "thumbnails"
    out = output / slide_id
    settings = {
        "slide": slide_source(SlideUnit(slide_id, slide_file, output)),
        "level": level,
        "tile_size": tile_size,
        "mpp": mpp,
        "slide_mpp": slide_mpp,
        "occupancy_threshold": occupancy_threshold,
        "coordinates": coordinates,
        "arithmetic": arithmetic,
    }
    if _is_whole(out, settings):
        return out
    with Slide(slide_file, mpp=slide_mpp) as slide:
        scale = _scale(slide, level, mpp)
        tissue = find_tissue(slide, arithmetic)
        for folder in (output, thumbnails):
            folder.mkdir(parents=True, exist_ok=True)
        found = tissue_tiles(
            slide,
            tile_size,
            scale,
            tissue,
            min_occupancy=occupancy_threshold,
            arithmetic=arithmetic,
            origin=coordinates,
        )
        partial = output / f".{slide_id[:100]}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            bar = ProgressBar(found, desc="tiles", unit="tile", disable=not progress)
            places = _write_tiles(bar, partial, slide_id)
            write_json(partial / _SETTINGS, settings)
            if not places:
                raise ValueError(
                    f"{slide_file}: no tile of {tile_size} px holds more tissue than "
                    f"{occupancy_threshold:g} of its pixels"
                )
            # Before the folder is there, since a run that finds it whole draws nothing.
            _draw_thumbnails(slide, thumbnails, slide_id, tissue, places, round(tile_size * scale))
            os.replace(partial, out)
            fsync_path(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def load_tile_encoder_transforms() -> Callable[[Any], Tensor]:
    """Returns the published transform; see `gigapath.tile_encoder.tile_transform`."""
    return tile_transform()


def load_tile_slide_encoder(
    local_tile_encoder_path: str = "",
    local_slide_encoder_path: str = "",
    global_pool: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Loads both encoders of Prov-GigaPath in evaluation mode.

    Args:
        local_tile_encoder_path: File or folder of weights; by default from the hub or its cache.
        local_slide_encoder_path: File or folder of the slide encoder's weights; by default from the
            hub or its cache.
        global_pool: Whether the slide encoder pools the mean of the tiles instead of the class
            token.

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
        ValueError: If the weights do not fit.
    """
    tile_model = tile_encoders.create_model(local_tile_encoder_path or tile_encoders.HUB_NAME)
    slide_model = slide_encoders.create_model(
        local_slide_encoder_path or tile_encoders.HUB_NAME,
        SLIDE_ARCHITECTURE,
        TILE_WIDTH,
        global_pool=global_pool,
    )
    return tile_model, slide_model


class TileEncodingDataset(Dataset[dict[str, Tensor]]):
    """Data set of tile images with coordinates, with the original's name and arguments.

    `run_inference_with_tile_encoder` reads images by itself; this class is for other data loaders.

    Args:
        image_paths: Images named by their coordinates, for instance `256x_512y.png`.
        transform: Maps a Pillow image to a tensor or array.

    Raises:
        ValueError: If a name has no coordinates.
    """

    def __init__(
        self,
        image_paths: Sequence[StrPath],
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.image_paths = list(image_paths)
        self.transform = transform
        self._tiles = FolderTiles.of_files(self.image_paths)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Returns `img` and `coords`, float32 `(2,)`, of one tile."""
        (pixels,) = self._tiles.read([idx])
        if isinstance(pixels, SlideError):
            raise pixels
        image: Any = Image.fromarray(pixels)
        if self.transform is not None:
            image = self.transform(image)
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image))
        return {
            "img": image,
            "coords": torch.from_numpy(self._tiles.coords[idx]).float(),
        }


def run_inference_with_tile_encoder(
    image_paths: Sequence[StrPath],
    tile_encoder: nn.Module,
    batch_size: int = 128,
    *,
    device: str | None = None,
    precision: Precision = "auto",
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Embeds tile images that are named by their coordinates, such as `256x_512y.png`.

    Args:
        image_paths: The images, from one or more folders.
        tile_encoder: The model; moved to the device and converted to the precision.
        batch_size: Number of images per batch.
        device: Device; by default a GPU if there is one.
        precision: `auto` is fp16 on a GPU, as in the original, and fp32 on a CPU.
        workers: Number of reading processes; 0 reads ahead in a thread.
        progress: Whether to show a progress bar.

    Returns:
        `tile_embeds` float32 `(N, embed_dim)` and `coords` float32 `(N, 2)`, in the given order.

    Raises:
        ValueError: If there are no images, a name has no coordinates, or an image cannot be read.
    """
    where = choose_device(device)
    encoder = TileEncoder(tile_encoder, device=where, precision=choose_precision(precision, where))
    tiles = FolderTiles.of_files(image_paths)
    total = len(tiles.files)
    found = read_tiles(
        tiles,
        [range(total)],
        encoder.resize,
        workers=workers,
    )
    embeds: list[Tensor] = []
    batch: list[Any] = []
    bar = ProgressBar(
        found, total=len(tiles.files), desc="tiles", unit="tile", disable=not progress
    )
    for index, pixels in bar:
        if isinstance(pixels, SlideError):
            raise pixels
        batch.append(pixels)
        if len(batch) == batch_size or index + 1 == total:
            embeds.append(encoder.encode(np.stack(batch)))
            batch = []
    return {
        "tile_embeds": torch.cat(embeds).cpu(),
        "coords": torch.from_numpy(tiles.coords).float(),
    }


@torch.inference_mode()
def run_inference_with_slide_encoder(
    tile_embeds: Tensor,
    coords: Tensor,
    slide_encoder_model: nn.Module,
    *,
    order: Order = "row-major",
    device: str | None = None,
    precision: Precision = "auto",
) -> dict[str, Tensor]:
    """Embeds one slide, or a batch of slides with the same number of tiles.

    Args:
        tile_embeds: `(N, embed_dim)` or `(batch, N, embed_dim)`.
        coords: `(N, 2)` or `(batch, N, 2)`, x and y in level-0 pixels. Slides with tiles beyond the
            left or upper edge are shifted, see `gigapath.embed.slide_vectors.onto_slide`.
        slide_encoder_model: The model; moved to the device.
        order: Order of the tiles, on which LongNet's output depends. `row-major` sorts them, as in
            training; `given` keeps their order, which in the original is that of a directory
            listing.
        device: Device; by default a GPU if there is one.
        precision: `auto` is fp16 on a GPU, as in the original, and fp32 on a CPU.

    Returns:
        `layer_0_embed` (before the first layer) to `layer_DEPTH_embed`, and `last_layer_embed`,
        float32 `(batch, dim)` each.

    Raises:
        ValueError: If there are no tiles, shapes do not fit, values are not finite, coordinates lie
            outside the grid or have another unit, or the order is unknown.

    Example:
        >>> model = slide_encoders.create_model("", "gigapath_slide_enc12l384d", in_chans=384)
        >>> coords = 256 * torch.arange(40).reshape(20, 2)
        >>> outputs = run_inference_with_slide_encoder(
        ...     torch.zeros(20, 384), coords, model, device="cpu"
        ... )
        >>> len(outputs), outputs["last_layer_embed"].shape
        (14, torch.Size([1, 384]))
    """
    if order not in ("row-major", "given"):
        raise ValueError(f"order {order!r}: expected row-major or given")
    if tile_embeds.dim() == 2:
        tile_embeds, coords = tile_embeds[None], coords[None]
    if coords.shape != (*tile_embeds.shape[:2], 2):
        raise ValueError(
            f"coords {tuple(coords.shape)}: expected {(*tile_embeds.shape[:2], 2)}, one per tile"
        )
    if order == "row-major":
        rows = torch.stack([row_major(places) for places in coords])[..., None]
        tile_embeds = tile_embeds.take_along_dim(rows.to(tile_embeds.device), 1)
        coords = coords.take_along_dim(rows.to(coords.device), 1)
    where = choose_device(device)
    model = slide_encoder_model.to(where).eval()
    if getattr(model, "out_of_grid", "error") == "error" and coords.numel():
        coords = onto_slide(coords, int(cast(Any, model).tile_size))
    with autocast(choose_precision(precision, where), where):
        layers = model(tile_embeds.to(where), coords.to(where), all_layer_embed=True)
    outputs = {f"layer_{n}_embed": layer.float().cpu() for n, layer in enumerate(layers)}
    outputs["last_layer_embed"] = outputs[f"layer_{len(layers) - 1}_embed"]
    return outputs


def row_major(coords: Tensor) -> Tensor:
    """Returns the indices that sort tiles `(N, 2)` row by row, from left to right.

    Example:
        >>> row_major(torch.tensor([[256, 256], [256, 0], [0, 256]])).tolist()
        [1, 2, 0]
    """
    places = coords.detach().cpu().numpy()
    return torch.from_numpy(np.lexsort((places[:, 0], places[:, 1])))


def _scale(slide: Slide, level: int, mpp: float | None) -> float:
    if mpp is not None:
        if level:
            raise ValueError(f"level {level} and mpp {mpp:g}: give one of them")
        return mpp / slide.mpp
    if not 0 <= level < len(slide.level_downsamples):
        raise ValueError(
            f"{slide.path.name}: level {level}; it has 0 to {len(slide.level_downsamples) - 1}"
        )
    return slide.level_downsamples[level]


def _is_whole(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns whether the folder is the complete output of a run with these settings.

    Raises:
        ValueError: If the folder contains something else.
    """
    if not folder.exists():
        return False
    way_out = "remove it, or name another save_dir"
    try:
        with (folder / _TABLE).open(newline="", encoding="utf-8") as file:
            names = [Path(row["image"]).name for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no complete {_TABLE} in this folder; {way_out}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(names)} images of {_TABLE} are not there; {way_out}"
        )
    if not (folder / _SETTINGS).is_file():
        raise ValueError(
            f"{folder}: tiles of the original, whose coordinates have x and y of the tissue's "
            f"corner swapped; {way_out}"
        )
    found = json.loads((folder / _SETTINGS).read_bytes())
    # Version 0.1.0 did not record the slide; and the tiles of a slide that is gone are kept.
    known = {
        name for name, value in settings.items() if name != "slide" or (value and name in found)
    }
    changed = {name: found.get(name) for name in known if found.get(name) != settings[name]}
    if "slide" in changed:
        raise ValueError(f"{folder}: holds tiles of another slide of this name; {way_out}")
    if changed:
        raise ValueError(f"{folder}: was tiled with other settings, {changed}; {way_out}")
    return True


def _write_tiles(found: Any, folder: Path, slide_id: str) -> list[tuple[int, int]]:
    """Writes images and tables; returns the positions (x, y) of the tiles in level-0 pixels."""
    places: list[tuple[int, int]] = []
    failed = 0
    with (
        (folder / _TABLE).open("w", newline="", encoding="utf-8") as table,
        (folder / _FAILED).open("w", newline="", encoding="utf-8") as failures,
    ):
        rows, failed_rows = csv.writer(table, lineterminator="\n"), csv.writer(failures)
        rows.writerow(_COLUMNS)
        failed_rows.writerow(["tile_id"])
        for tile in found:
            if isinstance(tile, SlideError):
                failed_rows.writerow([str(tile)])
                failed += 1
                continue
            places.append((tile.x_level0, tile.y_level0))
            rows.writerow(_table_row(tile, slide_id))
            name = _descriptor(tile)
            (folder / f"{name}.png").write_bytes(encode_png(tile.pixels))
    if failed and not places:
        raise SlideError(f"{slide_id}: none of {failed} tiles can be read")
    if failed:
        warnings.warn(f"{slide_id}: {failed} tiles cannot be read; see {_FAILED}", stacklevel=3)
    return places


def _table_row(tile: GridTile, slide_id: str) -> list[Any]:
    name, occupancy = _descriptor(tile), tile.occupancy
    shown = str(occupancy) if occupancy.dtype == np.float16 else f"{float(occupancy):.6f}"
    place = (tile.x_named, tile.y_named)
    return [slide_id, f"{slide_id}.{name}", f"{slide_id}/{name}.png", None, *place, shown]


def _descriptor(tile: GridTile) -> str:
    return f"{tile.x_named:05d}x_{tile.y_named:05d}y"


def _draw_thumbnails(
    slide: Slide,
    folder: Path,
    slide_id: str,
    tissue: Tissue,
    places: list[tuple[int, int]],
    size_level0: int,
) -> None:
    """Draws the slide, the box of its tissue, and the tiles in the box."""
    thumbnail = slide.thumbnail(_THUMBNAIL_PX)
    overlay = draw_patches(
        slide, np.array(places, np.int64), size_level0, max_side_px=_THUMBNAIL_PX
    )
    box, scale = tissue.box, thumbnail.width / slide.dimensions[0]
    corners = (box.x, box.y, box.x + box.width, box.y + box.height)
    region = tuple(round(edge * scale) for edge in corners)
    for image, name in (
        (thumbnail, "original"),
        (thumbnail.crop(region), "roi"),  # type: ignore[arg-type]
        (overlay.crop(region), "roi_tiles"),  # type: ignore[arg-type]
    ):
        with atomic_file(folder / f"{slide_id}_{name}.png") as partial:
            image.save(partial, "PNG")

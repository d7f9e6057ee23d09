"""Synthetic slides: real pixels in tiled files as scanners write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage import data


def tissue_pixels(width: int, height: int, *, seed: int = 0, blank: float = 0.0) -> NDArray[Any]:
    """Real immunohistochemistry, mirrored to size; `blank`: fraction of bare glass on the left."""
    source = data.immunohistochemistry()
    rows = np.pad(source, ((0, source.shape[0]), (0, source.shape[1]), (0, 0)), mode="symmetric")
    shift = np.random.default_rng(seed).integers(0, source.shape[0], 2)
    rows = np.roll(rows, tuple(shift), (0, 1))
    repeats = (-(-height // rows.shape[0]), -(-width // rows.shape[1]), 1)
    pixels = np.tile(rows, repeats)[:height, :width].copy()
    if blank:
        pixels[:, : int(width * blank)] = 243
    return pixels


def write_svs(
    path: Path,
    pixels: NDArray[Any],
    *,
    tile: int = 256,
    mpp: float | None = 0.25,
    magnification: float | None = 40,
    downsamples: tuple[int, ...] = (4,),
    subsampling: tuple[int, int] = (2, 2),
    quality: int = 80,
) -> Path:
    """Writes an SVS as Aperio's scanners do: tiled JPEG levels, resolution in the description."""
    height, width = pixels.shape[:2]
    description = f"Aperio Image Library v11.2.1 \r\n{width}x{height} ({tile}x{tile}) JPEG/RGB Q=80"
    if magnification is not None:
        description += f"|AppMag = {magnification:g}"
    if mpp is not None:
        description += f"|MPP = {mpp}"
    options: dict[str, Any] = dict(
        tile=(tile, tile),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": quality},
        subsampling=subsampling,
        metadata=None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description=description, **options)
        thumbnail = pixels[:: max(1, height // 256), :: max(1, width // 256)]
        tiff.write(thumbnail, photometric="rgb", metadata=None)
        for step in downsamples:
            tiff.write(pixels[::step, ::step], description=description, **options)
    return path


def write_tiff(path: Path, pixels: NDArray[Any], *, tile: int = 240, **options: Any) -> Path:
    """Writes a generic tiled TIFF of one level."""
    settings = dict(tile=(tile, tile), photometric="rgb", compression="jpeg", metadata=None)
    tifffile.imwrite(path, pixels, **(settings | options))  # type: ignore[arg-type]
    return path


def spoil_tile(path: Path, number: int) -> None:
    """Overwrites a JPEG tile of level 0 with zeros."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, count = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)

"""Embeddings of a slide's tiles: streamed, resumable, whole or absent.

Parts of a few thousand tiles are kept while a slide is under way. A part starts a batch, and parts
have one size, so that a continued run gives the same bytes as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath.embed.tile_images import Tiles, read_tiles
from gigapath.embed.tile_inference import TileEncoder
from pathcore.files import atomic_file
from pathcore.jobs import UnitError
from pathcore.pool import ProgressBar
from wsi.reader import SlideError
from wsi.store import read_attributes, read_features, write_features

PART_TILES = 2048
"""About a minute of a GPU's work, and 13 MB; what a kill can cost."""

_SOURCE = "tiles_sha256"
_DAMAGED = "num_damaged"


class EmbeddingError(UnitError):
    """Embeddings or coordinates that cannot be right."""

    reason = "bad embeddings or coordinates"


@dataclass(frozen=True)
class TileEmbeddings:
    """What is known of a slide's tiles.

    Attributes:
        features: float32 `(N, embed_dim)`.
        coords: int64 `(N, 2)`: left and top in level-0 pixels.
        num_damaged: Tiles that could not be read and are left out.
        reused: Whether an earlier run had computed them.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    num_damaged: int = 0
    reused: bool = False


def embed_tiles(
    tiles: Tiles,
    encoder: TileEncoder,
    out: str | os.PathLike[str],
    parts: str | os.PathLike[str],
    *,
    name: str,
    weights_sha256: str = "",
    attributes: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    part_tiles: int = PART_TILES,
    workers: int = 0,
    progress: bool = False,
) -> TileEmbeddings:
    """Writes the embeddings of a slide's tiles as `features` and `coords`; see `wsi.store`.

    Nothing is computed if `out` has them already, of the same tiles and the same encoder.

    Args:
        tiles: The tiles.
        encoder: Embeds them.
        out: The `.h5` file.
        parts: Folder for what is not whole yet; removed at the end.
        name: Of the encoder.
        weights_sha256: Of the encoder's weights.
        attributes: Further ones of the coordinates.
        batch_size: Tiles embedded at once.
        part_tiles: Tiles of a part, rounded up to whole batches.
        workers: Processes that read; see `read_tiles`.
        progress: Show a bar of the tiles.

    Raises:
        SlideError: None of the tiles can be read.
        EmbeddingError: There are no tiles, or embeddings are not finite.
    """
    if not len(tiles.coords):
        raise EmbeddingError(f"{tiles.name}: no tiles")
    if batch_size < 1 or part_tiles < 1:
        raise ValueError(f"batch_size {batch_size}, part_tiles {part_tiles}: at least 1 expected")
    out, size = Path(out), -(-part_tiles // batch_size) * batch_size
    source = _source(tiles, weights_sha256, encoder, batch_size, size)
    if (kept := _kept(out, source)) is not None:
        shutil.rmtree(parts, ignore_errors=True)  # a kill may have come before this
        return kept
    folder = Path(parts) / source[:16]
    folder.mkdir(parents=True, exist_ok=True)
    number_of = range(-(-len(tiles.coords) // size))
    missing = [n for n in number_of if not _part(folder, n).is_file()]
    ranges = [range(n * size, min((n + 1) * size, len(tiles.coords))) for n in missing]
    stream = read_tiles(
        tiles,
        ranges,
        encoder.resize,
        workers=workers,
    )
    total = len(tiles.coords)
    with ProgressBar(
        total=total,
        initial=total - sum(map(len, ranges)),
        desc=tiles.name,
        unit="tile",
        leave=False,
        disable=not progress,
    ) as bar:
        for number, items in groupby(stream, key=lambda item: item[0] // size):
            _write_part(_part(folder, number), items, tiles, encoder, batch_size, bar)
    result = _join(folder, number_of, tiles)
    attributes = {**(attributes or {}), _SOURCE: source, _DAMAGED: result.num_damaged}
    transform = json.dumps(encoder.transform.to_dict())
    attributes |= {"weights_sha256": weights_sha256, "precision": encoder.precision}
    attributes |= {"transform": transform}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_features(out, result.features, result.coords, encoder=name, attributes=attributes)
    shutil.rmtree(parts, ignore_errors=True)
    return result


def check_features(
    features: NDArray[Any], coords: NDArray[np.int64], where: str, *, width: int | None = None
) -> None:
    """Checks what a slide encoder is to be fed with.

    Args:
        features: `(N, dim)`.
        coords: `(N, 2)`.
        where: Of what file or slide.
        width: The dim that is expected.

    Raises:
        EmbeddingError: No tile, another width or length, or values that are not finite.
    """
    if not len(features):
        raise EmbeddingError(f"{where}: no tiles")
    if len(features) != len(coords):
        raise EmbeddingError(f"{where}: {len(features)} features, {len(coords)} coordinates")
    if width is not None and features.shape[1] != width:
        raise EmbeddingError(
            f"{where}: features of width {features.shape[1]}; the slide encoder takes {width}: "
            "were they made by another tile encoder?"
        )
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        x, y = coords[first].tolist()
        raise EmbeddingError(
            f"{where}: {int(bad.sum())} of {len(features)} tiles have features that are not "
            f"finite, the first at ({x}, {y}); if they were computed in fp16, try bf16 or fp32"
        )


def _write_part(
    path: Path,
    items: Iterator[tuple[int, NDArray[np.uint8] | str]],
    tiles: Tiles,
    encoder: TileEncoder,
    batch_size: int,
    bar: ProgressBar,
) -> None:
    faults: dict[int, str] = {}
    good: list[int] = []
    features: list[Any] = []
    for _, batch in groupby(items, key=lambda item: item[0] // batch_size):
        pixels: list[NDArray[np.uint8]] = []
        for index, found in batch:
            if isinstance(found, str):
                faults[index] = found
            else:
                good.append(index)
                pixels.append(found)
        bar.update(len(pixels))
        if pixels:  # left on the device: the next batch is read while this one is computed
            features.append(encoder.encode(np.stack(pixels)))
    width = encoder.embed_dim
    values = np.concatenate(
        [np.empty((0, width), np.float32), *(f.cpu().numpy() for f in features)]
    )
    indices = np.array(good, np.int64)
    if len(good):
        check_features(values, tiles.coords[indices], tiles.name)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, features=values, indices=indices, faults=np.array(json.dumps(faults)))


def _join(folder: Path, numbers: range, tiles: Tiles) -> TileEmbeddings:
    features, indices = [], []
    faults: dict[str, str] = {}
    for number in numbers:
        with np.load(_part(folder, number), allow_pickle=False) as part:
            features.append(part["features"])
            indices.append(part["indices"])
            faults |= json.loads(str(part["faults"]))
    good = np.concatenate(indices)
    if not len(good):
        last = next(reversed(faults.values()))
        raise SlideError(f"{tiles.name}: none of {len(faults)} tiles can be read; the last: {last}")
    return TileEmbeddings(np.concatenate(features), tiles.coords[good], len(faults))


def _kept(out: Path, source: str) -> TileEmbeddings | None:
    """What an earlier run left, if it is of the same source; anything else is replaced."""
    if not out.is_file():
        return None
    try:
        attributes = read_attributes(out)
        features, coords = read_features(out)
    except (OSError, KeyError, ValueError):
        return None
    if attributes.get(_SOURCE) != source:
        return None
    damaged = int(attributes.get(_DAMAGED, 0))
    return TileEmbeddings(features.astype(np.float32), coords, damaged, True)


def _source(tiles: Tiles, weights: str, encoder: TileEncoder, *sizes: int) -> str:
    text = f"{tiles.digest()} {weights} {encoder.precision} {encoder.transform} {sizes}"
    return hashlib.sha256(text.encode()).hexdigest()


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"

"""Computes the features of the patches of a slide, resumable after a few thousand patches.

Patches are read ahead of the encoder, from a slide or from a folder of images named by position as
Prov-GigaPath's tiler does (`01581x_25327y.png`). Finished parts are stored until the slide is
complete. Parts have a fixed size that is a multiple of the batch size, so that a continued run
forms the same batches, and writes the same bytes, as an uninterrupted one. Torch is not imported,
so that reading processes start fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.files import StrPath, atomic_file
from pathcore.images import ImageError, image_size, load_image
from pathcore.jobs import UnitError
from pathcore.pool import ProgressBar, WorkerDiedError, run_tasks
from wsi.reader import Region, Slide, SlideError
from wsi.slide_listing import TILE_NAME
from wsi.store import read_attributes, read_features, write_features

PART_TILES = 2048
"""Number of tiles per part, which a kill can cost: about a minute on a GPU, 13 MB of features."""

READ_TILES = 256
"""Number of tiles per task of a reading process: 38 MB at 224 px."""

_FILTERS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
_THREAD_TILES = 16
_THREAD_DEPTH = 8
"""Number of groups of `_THREAD_TILES` tiles that the reading thread keeps ahead of the encoder."""

_SOURCE = "tiles_sha256"
_DAMAGED = "num_damaged"

_Item = TypeVar("_Item")


class Tiles(Protocol):
    """Interface of the tiles of a slide."""

    @property
    def name(self) -> str:
        """Name of the slide."""
        ...

    @property
    def coords(self) -> NDArray[np.int64]:
        """Left and top `(N, 2)` in level-0 pixels."""
        ...

    @property
    def size_level0(self) -> int:
        """Side of a tile in level-0 pixels."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """Yields RGB `(height, width, 3)` for each index, or the reason why it cannot be read."""
        ...

    def digest(self) -> str:
        """Returns a string that changes if other pixels would be read."""
        ...


@dataclass(frozen=True)
class SlideTiles:
    """Tiles that are read from a slide.

    Attributes:
        path: The slide.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of a tile in level-0 pixels.
        tile_px: Side of the resulting image in pixels.
        slide_id: Id of the slide; by default its file name without suffix.
    """

    path: Path
    coords: NDArray[np.int64]
    size_level0: int
    tile_px: int
    slide_id: str = ""

    @property
    def name(self) -> str:
        """Id of the slide."""
        return self.slide_id or self.path.stem

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """See `Tiles`."""
        regions = [
            Region(int(x), int(y), self.size_level0, self.tile_px)
            for x, y in self.coords[np.asarray(indices, np.int64)]
        ]
        yield from _open_slide(self.path).read_many(regions)

    def digest(self) -> str:
        """See `Tiles`; covers name, size and modification time of the slide."""
        state = self.path.stat()
        head = f"{self.path.name} {state.st_size} {state.st_mtime_ns} "
        return _digest_coords(f"{head}{self.size_level0} {self.tile_px}", self.coords)


@dataclass(frozen=True)
class FolderTiles:
    """Tiles that are stored as images.

    Attributes:
        folder: The folder; its name is the id of the slide.
        files: Names of the images, or absolute paths.
        coords: int64 `(N, 2)`, left and top in level-0 pixels, from the names of the images.
        size_level0: Side of a tile in level-0 pixels.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("00256x_00000y.png", "00000x_00000y.png"):
        ...     Image.new("RGB", (256, 256)).save(folder / name)
        >>> tiles = FolderTiles.find(folder)
        >>> tiles.coords.tolist(), tiles.size_level0, next(tiles.read([0])).shape
        ([[0, 0], [256, 0]], 256, (256, 256, 3))
    """

    folder: Path
    files: tuple[str, ...]
    coords: NDArray[np.int64]
    size_level0: int

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @classmethod
    def find(cls, folder: StrPath, *, size_level0: int | None = None) -> FolderTiles:
        """Lists the tiles of a folder, sorted row by row.

        Args:
            folder: The folder; files with other names are ignored.
            size_level0: Side of a tile in level-0 pixels; by default the smallest distance between
                two tiles, or the width of the image if there is only one.

        Raises:
            FileNotFoundError: If the folder does not exist or has no tiles.
            ValueError: If two files have the same position.
        """
        folder = Path(os.path.abspath(folder))
        if not folder.is_dir():
            raise FileNotFoundError(f"tiles {folder}: no such folder")
        found: dict[tuple[int, int], str] = {}
        for name in sorted(os.listdir(folder)):
            if (match := TILE_NAME.fullmatch(name)) is None:
                continue
            x, y = int(match[1]), int(match[2])
            if (y, x) in found:
                raise ValueError(f"tiles {folder}: both {found[y, x]} and {name} lie at ({x}, {y})")
            found[y, x] = name
        if not found:
            raise FileNotFoundError(f"tiles {folder}: no image named like 01581x_25327y.png")
        places = sorted(found)
        coords = np.array([(x, y) for y, x in places], np.int64)
        files = tuple(found[place] for place in places)
        size = size_level0 or _spacing(coords) or _side_of(folder / files[0])
        return cls(folder, files, coords, size)

    @classmethod
    def of_files(cls, paths: Sequence[StrPath]) -> FolderTiles:
        """Returns tiles from images in one or more folders, in the given order.

        Raises:
            ValueError: If `paths` is empty, or a name has no coordinates.
        """
        if not len(paths):
            raise ValueError("tiles: no images given")
        coords = []
        for path in map(Path, paths):
            if (match := TILE_NAME.fullmatch(path.name)) is None:
                raise ValueError(f"{path}: expected a name like 01581x_25327y.png")
            coords.append((int(match[1]), int(match[2])))
        files = tuple(os.path.abspath(path) for path in paths)
        places = np.array(coords, np.int64)
        return cls(Path(files[0]).parent, files, places, _spacing(places) or 1)

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """See `Tiles`."""
        for index in indices:
            path = self.folder / self.files[index]
            try:
                yield np.asarray(load_image(path))
            except ImageError as error:
                yield SlideError(f"{path}: cannot be read as an image: {error}")

    def digest(self) -> str:
        """See `Tiles`; covers name, size and modification time of the images."""
        states = ((self.folder / name).stat() for name in self.files)
        head = " ".join(f"{state.st_size}-{state.st_mtime_ns}" for state in states)
        return _digest_coords(head, self.coords)


def fit(pixels: NDArray[np.uint8], resize: Resize) -> NDArray[np.uint8]:
    """Resizes and crops like torchvision's `Resize` and `CenterCrop` on a Pillow image.

    Args:
        pixels: uint8 RGB `(height, width, 3)`.
        resize: Sizes and interpolation.

    Returns:
        uint8 RGB `(crop_px, crop_px, 3)`.

    Example:
        >>> fit(np.zeros((256, 300, 3), np.uint8), Resize(crop_px=224, resize_px=256)).shape
        (224, 224, 3)
    """
    height, width = pixels.shape[:2]
    if isinstance(resize.resize_px, int):
        longer = int(resize.resize_px * max(height, width) / min(height, width))
        size = (resize.resize_px, longer) if width <= height else (longer, resize.resize_px)
        same = min(height, width) == resize.resize_px
    else:
        size = (height, width) if resize.resize_px is None else resize.resize_px
        size = size[::-1]
        same = size == (width, height)
    if not same:
        image = Image.fromarray(pixels)
        pixels = np.asarray(image.resize(size, _FILTERS[resize.interpolation]))
    height, width = pixels.shape[:2]
    top, left = round((height - resize.crop_px) / 2), round((width - resize.crop_px) / 2)
    return pixels[top : top + resize.crop_px, left : left + resize.crop_px]


@dataclass(frozen=True)
class Resize:
    """Resizing and cropping of a transform; see `pathcore.encoders.Transform`.

    Attributes:
        crop_px: Side of the centre crop in pixels.
        resize_px: Shorter side before cropping, or `(height, width)`; None keeps the size.
        interpolation: Name of a resampling filter of Pillow in lower case.
    """

    crop_px: int
    resize_px: int | tuple[int, int] | None
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class _ReadTask:
    tiles: Tiles
    indices: range
    resize: Resize | None
    number: int = 0


def read_tiles(
    tiles: Tiles, parts: Sequence[range], resize: Resize | None, *, workers: int = 0
) -> Iterator[tuple[int, NDArray[np.uint8] | SlideError]]:
    """Reads tiles ahead of the consumer.

    Args:
        tiles: The tiles.
        parts: Ranges of indices to read.
        resize: Resizing and cropping; None keeps the size.
        workers: Number of reading processes; 0 reads in a thread of this process.

    Yields:
        In order, each index with RGB `(crop_px, crop_px, 3)`, or with the error if it cannot be
        read.

    Raises:
        SlideError: If a reading process dies.
    """
    if workers < 1:
        tasks = (_ReadTask(tiles, part, resize) for part in parts)
        items = (item for task in tasks for item in _read_in_order(task))
        for group in read_ahead(_in_groups(items, _THREAD_TILES), _THREAD_DEPTH):
            yield from group
        return
    pieces = [part[n : n + READ_TILES] for part in parts for n in range(0, len(part), READ_TILES)]
    tasks = (_ReadTask(tiles, p, resize, n) for n, p in enumerate(pieces))
    early: dict[int, list[tuple[int, NDArray[np.uint8] | SlideError]]] = {}
    due = 0

    def refuse(task: _ReadTask, error: WorkerDiedError) -> Iterable[_ReadTask]:
        first, last = task.indices[0], task.indices[-1]
        raise SlideError(f"{tiles.name}: reading tiles {first} to {last} failed: {error}")

    for number, piece in run_tasks(_read_task, tasks, workers=workers, on_death=refuse):
        early[number] = piece
        while due in early:
            yield from early.pop(due)
            due += 1


def read_ahead(items: Iterator[_Item], depth: int) -> Iterator[_Item]:
    """Yields items that a thread fetches in advance, at most `depth` of them."""
    end = object()

    def draw() -> Any:
        return next(items, end)

    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Any]] = deque(pool.submit(draw) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(draw))
                yield item
        finally:
            for future in pending:
                future.cancel()


def _read_task(task: _ReadTask) -> tuple[int, list[tuple[int, NDArray[np.uint8] | SlideError]]]:
    return task.number, list(_read_in_order(task))


def _read_in_order(task: _ReadTask) -> Iterator[tuple[int, NDArray[np.uint8] | SlideError]]:
    found = task.tiles.read(task.indices)
    for index, pixels in zip(task.indices, found, strict=True):
        if not isinstance(pixels, SlideError):
            pixels = np.ascontiguousarray(
                pixels if task.resize is None else fit(pixels, task.resize)
            )
        yield index, pixels


class _Held(threading.local):
    """Last slide of a thread; opening a slide for each tile would cost more than reading it."""

    path: Path | None = None
    slide: Slide | None = None


_held = _Held()


def _open_slide(path: Path) -> Slide:
    if _held.slide is None or _held.path != path:
        if _held.slide is not None:
            _held.slide.close()
        _held.path, _held.slide = path, None
        _held.slide = Slide(path)
    return _held.slide


def _in_groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _spacing(coords: NDArray[np.int64]) -> int:
    """Returns the smallest distance of two columns or rows; 0 if there is only one of each."""
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    found = np.concatenate(steps)
    return int(found.min()) if len(found) else 0


def _side_of(path: Path) -> int:
    try:
        return image_size(path)[0]
    except ImageError as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def _digest_coords(head: str, coords: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(head.encode(errors="surrogateescape"))
    digest.update(coords.tobytes())
    return digest.hexdigest()


class EmbeddingError(UnitError):
    """Raised if embeddings or coordinates are missing, not finite, or of the wrong shape."""

    reason = "bad embeddings or coordinates"


@dataclass(frozen=True)
class TileEmbeddings:
    """Embeddings of the tiles of a slide.

    Attributes:
        features: float32 `(N, embed_dim)`.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        num_damaged: Number of tiles that could not be read; they have no row.
        reused: Whether they come from an earlier run.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    num_damaged: int = 0
    reused: bool = False


class PatchEncoder(Protocol):
    """Interface of encoders that map pixels to features."""

    @property
    def resize(self) -> Resize | None:
        """How patches are resized and cropped before `encode`; None keeps their size."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> Any:
        """Maps uint8 RGB `(batch, height, width, 3)` to a torch tensor, float32 `(batch, dim)`.

        The tensor may be on a GPU with its computation pending; the next batch is read meanwhile.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Returns a description of the encoder for feature files, as attributes of HDF5."""
        ...


def embed_tiles(
    tiles: Tiles,
    encoder: PatchEncoder,
    out: StrPath,
    parts: StrPath,
    *,
    name: str,
    weights_sha256: str = "",
    attributes: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    part_tiles: int = PART_TILES,
    workers: int = 0,
    progress: bool = False,
) -> TileEmbeddings:
    """Computes the embeddings of a slide's tiles and writes them in the format of `wsi.store`.

    Nothing is computed if `out` already has the embeddings of the same tiles, encoder and batch
    size.

    Args:
        tiles: The tiles.
        encoder: The encoder.
        out: The `.h5` file.
        parts: Folder for finished parts until the slide is complete; removed at the end.
        name: Name of the encoder.
        weights_sha256: SHA-256 of the encoder's weights.
        attributes: Further attributes of the coordinates.
        batch_size: Number of tiles per forward pass.
        part_tiles: Number of tiles per part, rounded up to whole batches.
        workers: Number of reading processes; 0 reads in a thread.
        progress: Whether to show a progress bar over the tiles.

    Raises:
        SlideError: If none of the tiles can be read.
        EmbeddingError: If there are no tiles, or embeddings are not finite.
    """
    if not len(tiles.coords):
        raise EmbeddingError(f"{tiles.name}: no tiles")
    if batch_size < 1 or part_tiles < 1:
        raise ValueError(f"batch_size {batch_size}, part_tiles {part_tiles}: expected at least 1")
    out, size = Path(out), -(-part_tiles // batch_size) * batch_size
    source = _source(tiles, weights_sha256, encoder, batch_size, size)
    if (kept := _kept(out, source)) is not None:
        shutil.rmtree(parts, ignore_errors=True)  # left behind if the run was killed at the end
        return kept
    folder = Path(parts) / source[:16]
    folder.mkdir(parents=True, exist_ok=True)
    number_of = range(-(-len(tiles.coords) // size))
    missing = [n for n in number_of if not _part(folder, n).is_file()]
    ranges = [range(n * size, min((n + 1) * size, len(tiles.coords))) for n in missing]
    stream = read_tiles(tiles, ranges, encoder.resize, workers=workers)
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
    attributes |= {"weights_sha256": weights_sha256, **encoder.describe()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_features(out, result.features, result.coords, encoder=name, attributes=attributes)
    shutil.rmtree(parts, ignore_errors=True)
    return result


def check_features(
    features: NDArray[Any], coords: NDArray[np.int64], where: str, *, width: int | None = None
) -> None:
    """Checks the input of a slide encoder.

    Args:
        features: `(N, dim)`.
        coords: `(N, 2)`.
        where: Name of the file or slide, for error messages.
        width: Expected `dim`; by default any.

    Raises:
        EmbeddingError: If there are no tiles, shapes do not fit, or values are not finite.
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
    items: Iterator[tuple[int, NDArray[np.uint8] | SlideError]],
    tiles: Tiles,
    encoder: PatchEncoder,
    batch_size: int,
    bar: ProgressBar,
) -> None:
    faults: dict[int, str] = {}
    good: list[int] = []
    features: list[Any] = []
    for _, batch in groupby(items, key=lambda item: item[0] // batch_size):
        pixels: list[NDArray[np.uint8]] = []
        for index, found in batch:
            if isinstance(found, SlideError):
                faults[index] = str(found)
            else:
                good.append(index)
                pixels.append(found)
        bar.update(len(pixels))
        if pixels:  # results stay on the device, so that reading and computing overlap
            features.append(encoder.encode(np.stack(pixels)))
    values = np.empty((0, 0), np.float32)
    if features:
        values = np.concatenate([batch_features.cpu().numpy() for batch_features in features])
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
            if len(part["indices"]):
                features.append(part["features"])
            indices.append(part["indices"])
            faults |= json.loads(str(part["faults"]))
    good = np.concatenate(indices)
    if not len(good):
        last = next(reversed(faults.values()))
        raise SlideError(f"{tiles.name}: none of {len(faults)} tiles can be read; the last: {last}")
    return TileEmbeddings(np.concatenate(features), tiles.coords[good], len(faults))


def _kept(out: Path, source: str) -> TileEmbeddings | None:
    """Returns the result of an earlier run with the same source, or None."""
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


def _source(tiles: Tiles, weights: str, encoder: PatchEncoder, *sizes: int) -> str:
    described = json.dumps(encoder.describe(), sort_keys=True)
    text = f"{tiles.digest()} {weights} {described} {sizes}"
    return hashlib.sha256(text.encode()).hexdigest()


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"

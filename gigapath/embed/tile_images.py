"""Pixels of tiles, read ahead of the encoder: straight from a slide, or from a folder of images.

A folder holds one image per tile, named as the original writes them: `01581x_25327y.png`. Knows no
torch, so that the processes that read start at once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.pool import WorkerDiedError, run_tasks
from wsi.reader import Region, Slide, SlideError
from wsi.slide_listing import TILE_NAME

_Item = TypeVar("_Item")

READ_TILES = 256
"""Tiles that a reading process hands over at once: 38 MB of 224 px."""

_FILTERS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
_THREAD_TILES = 16
_THREAD_DEPTH = 8


class Tiles(Protocol):
    """Tiles of one slide."""

    @property
    def name(self) -> str:
        """Of the slide."""
        ...

    @property
    def coords(self) -> NDArray[np.int64]:
        """Left and top in level-0 pixels: `(N, 2)`."""
        ...

    @property
    def size_level0(self) -> int:
        """Side of a tile in level-0 pixels."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """Yields RGB `(height, width, 3)` for each index, or why there is none."""
        ...

    def digest(self) -> str:
        """Changes when other pixels would be read."""
        ...


@dataclass(frozen=True)
class SlideTiles:
    """Tiles that are cut out of a slide while they are read.

    Attributes:
        path: The slide.
        coords: int64 `(N, 2)`: left and top in level-0 pixels.
        size_level0: Side of a tile in level-0 pixels.
        tile_px: Side of a tile after scaling.
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
        """See `Tiles`; the slide counts by name, size and time of change."""
        state = self.path.stat()
        head = f"{self.path.name} {state.st_size} {state.st_mtime_ns} "
        return _digest(f"{head}{self.size_level0} {self.tile_px}", self.coords)


@dataclass(frozen=True)
class FolderTiles:
    """Tiles that lie in a folder, sorted row by row.

    Attributes:
        folder: The folder; its name is the slide's.
        files: Names of the images.
        coords: int64 `(N, 2)`: left and top, as the names say.
        size_level0: Side of a tile in level-0 pixels.
    """

    folder: Path
    files: tuple[str, ...]
    coords: NDArray[np.int64]
    size_level0: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @classmethod
    def find(cls, folder: str | os.PathLike[str], *, size_level0: int | None = None) -> FolderTiles:
        """Lists the tiles of a folder; other files are left alone.

        Args:
            folder: The folder.
            size_level0: Side of a tile in level-0 pixels; by default the smallest distance of two
                tiles, or the width of the only one.

        Raises:
            FileNotFoundError: No such folder, or no tile in it.
            ValueError: Two files for one place.
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
    def of_files(cls, paths: Sequence[str | os.PathLike[str]]) -> FolderTiles:
        """Takes images of any folders, in the order given.

        Raises:
            ValueError: There are none, or a name without coordinates.
        """
        if not len(paths):
            raise ValueError("tiles: no images given")
        coords = []
        for path in map(Path, paths):
            if (match := TILE_NAME.fullmatch(path.name)) is None:
                raise ValueError(f"{path}: a name like 01581x_25327y.png expected")
            coords.append((int(match[1]), int(match[2])))
        files = tuple(os.path.abspath(path) for path in paths)
        places = np.array(coords, np.int64)
        return cls(Path(files[0]).parent, files, places, _spacing(places) or 1)

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8] | SlideError]:
        """See `Tiles`."""
        for index in indices:
            path = self.folder / self.files[index]
            try:
                with Image.open(path) as image:
                    yield np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                yield SlideError(f"{path}: cannot be read as an image: {error}")

    def digest(self) -> str:
        """See `Tiles`; the images count by name, size and time of change."""
        states = ((self.folder / name).stat() for name in self.files)
        head = " ".join(f"{state.st_size}-{state.st_mtime_ns}" for state in states)
        return _digest(head, self.coords)


def fit(pixels: NDArray[np.uint8], resize: Resize) -> NDArray[np.uint8]:
    """Resizes and crops as torchvision's `Resize` and `CenterCrop` do to a Pillow image.

    Args:
        pixels: RGB `(height, width, 3)`.
        resize: Sizes and interpolation.

    Returns:
        RGB `(crop_px, crop_px, 3)`.
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
    """The part of a transform that changes the size; see `pathcore.encoders.Transform`.

    Attributes:
        crop_px: Side of the result.
        resize_px: Shorter side before cropping, or `(height, width)`; None keeps the size.
        interpolation: Name of a filter of Pillow, in lower case.
    """

    crop_px: int
    resize_px: int | tuple[int, int] | None
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class _ReadTask:
    tiles: Tiles
    indices: range
    resize: Resize
    number: int = 0


def read_tiles(
    tiles: Tiles, parts: Sequence[range], resize: Resize, *, workers: int = 0
) -> Iterator[tuple[int, NDArray[np.uint8] | str]]:
    """Reads tiles ahead of whoever takes them.

    Args:
        tiles: Whose tiles.
        parts: Ranges of their indices.
        resize: See `fit`.
        workers: Processes that read; 0 reads in a thread of this one.

    Yields:
        In order, for each index RGB `(crop_px, crop_px, 3)`, or why there is none.
    """
    if workers < 1:
        tasks = (_ReadTask(tiles, part, resize) for part in parts)
        items = (item for task in tasks for item in _read(task))
        for group in read_ahead(_in_groups(items, _THREAD_TILES), _THREAD_DEPTH):
            yield from group
        return
    pieces = [part[n : n + READ_TILES] for part in parts for n in range(0, len(part), READ_TILES)]
    tasks = (_ReadTask(tiles, p, resize, n) for n, p in enumerate(pieces))
    early: dict[int, list[tuple[int, NDArray[np.uint8] | str]]] = {}
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
    """Draws items in a thread, at most `depth` ahead."""
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


def _read_task(task: _ReadTask) -> tuple[int, list[tuple[int, NDArray[np.uint8] | str]]]:
    return task.number, list(_read(task))


def _read(task: _ReadTask) -> Iterator[tuple[int, NDArray[np.uint8] | str]]:
    found = task.tiles.read(task.indices)
    for index, pixels in zip(task.indices, found, strict=True):
        if isinstance(pixels, SlideError):
            yield index, str(pixels)
        else:
            yield index, np.ascontiguousarray(fit(pixels, task.resize))


class _Held(threading.local):
    """The slide that this thread read last; opening one costs more than a tile."""

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
    """The smallest distance between two columns or two rows; 0 where there is but one of each."""
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    found = np.concatenate(steps)
    return int(found.min()) if len(found) else 0


def _side_of(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return int(image.width)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def _digest(head: str, coords: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(head.encode(errors="surrogateescape"))
    digest.update(coords.tobytes())
    return digest.hexdigest()

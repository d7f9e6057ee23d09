"""Decodes JPEG tiles of TIFF and SVS files by libjpeg-turbo, bypassing OpenSlide.

If patches share tiles, this is several times as fast as OpenSlide: sorted patches of 672 px took
3.7 instead of 11 ms of CPU each. It works for levels whose tiles form a plain grid. The caller must
check on each file that pixels equal OpenSlide's, since decoders differ in chroma upsampling.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_JPEG = 7
_RGB, _YCBCR = 2, 6
_CACHE_BYTES = 256 << 20  # of decoded tiles, for patches that share them

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels of a level; must lie inside the level."""


class TileError(ValueError):
    """Raised if a tile cannot be read or decoded."""


@dataclass(frozen=True)
class TiledLevel:
    """Layout of the tiles of one level; sizes are in pixels of the level.

    Attributes:
        width: Width of the level.
        height: Height of the level.
        tile_width: Width of a tile.
        tile_height: Height of a tile.
        offsets: Byte offset of each tile, row by row.
        num_bytes: Number of bytes of each tile.
        tables: JPEG tables that the tiles share, or None.
        colorspace: Colour space of the tiles; None if the JPEG data state it.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    tables: bytes | None
    colorspace: int | None

    @property
    def num_columns(self) -> int:
        """Number of tiles in a row."""
        return -(-self.width // self.tile_width)

    def tiles_of(self, box: Box) -> list[int]:
        """Returns the indices of the tiles that a box overlaps, row by row."""
        left, top, width, height = box
        rows = range(top // self.tile_height, (top + height - 1) // self.tile_height + 1)
        columns = range(left // self.tile_width, (left + width - 1) // self.tile_width + 1)
        return [row * self.num_columns + column for row in rows for column in columns]


class TiffTiles:
    """An open file whose tiles are decoded.

    Args:
        path: A TIFF or SVS file.
        sizes: Width and height of the levels to decode.

    Attributes:
        levels: The levels whose tiles can be decoded, by index in `sizes`.

    Raises:
        TileError: If the directory of the file cannot be read.
    """

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]]) -> None:
        self.path = path
        self.levels = _find_levels(path, sizes)
        self._descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def decode(self, level: TiledLevel, number: int) -> NDArray[np.uint8]:
        """Decodes one tile.

        Returns:
            RGB `(tile_height, tile_width, 3)`.

        Raises:
            TileError: If the file ends inside the tile, or the tile is not valid JPEG.
        """
        import imagecodecs

        offset, num_bytes = int(level.offsets[number]), int(level.num_bytes[number])
        try:
            data = os.pread(self._descriptor, num_bytes, offset)
        except OSError as error:
            raise TileError(f"{self.path.name}: tile {number} cannot be read: {error}") from error
        if len(data) < num_bytes:
            raise TileError(
                f"{self.path.name}: the file is truncated: tile {number} should lie at bytes "
                f"{offset:,} to {offset + num_bytes:,}, the file ends at "
                f"{os.fstat(self._descriptor).st_size:,}"
            )
        try:
            tile: NDArray[np.uint8] = imagecodecs.jpeg8_decode(
                data, tables=level.tables, colorspace=level.colorspace, outcolorspace=_RGB
            )
        except (imagecodecs.Jpeg8Error, ValueError, RuntimeError) as error:
            raise TileError(f"{self.path.name}: tile {number} is corrupt: {error}") from error
        if tile.shape != (level.tile_height, level.tile_width, 3):
            raise TileError(f"{self.path.name}: tile {number} has the shape {tile.shape}")
        return tile

    def read_boxes(
        self, level: TiledLevel, boxes: Sequence[Box]
    ) -> Iterator[NDArray[np.uint8] | TileError]:
        """Reads boxes in the given order and decodes each tile once.

        A tile is kept in memory from its first to its last use. If kept tiles exceed 256 MiB, the
        oldest are dropped and decoded again later.

        Yields:
            RGB `(height, width, 3)` for each box, or an error if it cannot be read.
        """
        uses = Counter(number for box in boxes for number in level.tiles_of(box))
        tile_bytes = 3 * level.tile_width * level.tile_height
        max_tiles = max(1, _CACHE_BYTES // tile_bytes)
        kept: dict[int, NDArray[np.uint8] | TileError] = {}
        for box in boxes:
            numbers = level.tiles_of(box)
            tiles: dict[int, NDArray[np.uint8]] = {}
            failure: TileError | None = None
            for number in numbers:
                tile = kept.get(number)
                if tile is None:
                    tile = self._try_decode(level, number)
                uses[number] -= 1
                if uses[number]:
                    kept[number] = tile
                else:
                    kept.pop(number, None)
                if isinstance(tile, TileError):
                    failure = tile
                else:
                    tiles[number] = tile
            while len(kept) > max_tiles:
                del kept[next(iter(kept))]
            yield failure or _assemble(level, box, tiles)

    def _try_decode(self, level: TiledLevel, number: int) -> NDArray[np.uint8] | TileError:
        try:
            return self.decode(level, number)
        except TileError as error:
            return error


def _assemble(
    level: TiledLevel, box: Box, tiles: dict[int, NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    left, top, width, height = box
    image = np.empty((height, width, 3), np.uint8)
    for number, tile in tiles.items():
        row, column = divmod(number, level.num_columns)
        y, x = row * level.tile_height - top, column * level.tile_width - left
        y0, x0 = max(y, 0), max(x, 0)
        y1, x1 = min(y + level.tile_height, height), min(x + level.tile_width, width)
        image[y0:y1, x0:x1] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
    return image


def _find_levels(path: Path, sizes: Sequence[tuple[int, int]]) -> dict[int, TiledLevel]:
    import tifffile

    try:
        return _levels_of_pages(path, sizes)
    except (tifffile.TiffFileError, struct.error, OSError, ValueError, TypeError) as error:
        raise TileError(f"{path.name}: its directory cannot be read: {error}") from error


def _levels_of_pages(path: Path, sizes: Sequence[tuple[int, int]]) -> dict[int, TiledLevel]:
    import tifffile

    levels: dict[int, TiledLevel] = {}
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            assert isinstance(page, tifffile.TiffPage)
            size = (page.imagewidth, page.imagelength)
            if size not in sizes or sizes.index(size) in levels or not _is_plain(page):
                continue
            levels[list(sizes).index(size)] = TiledLevel(
                *size,
                page.tilewidth,
                page.tilelength,
                np.asarray(page.dataoffsets, np.int64),
                np.asarray(page.databytecounts, np.int64),
                page.jpegtables,
                # The same rule as in tifffile: without a JFIF header, a decoder would assume YCbCr.
                _RGB if page.photometric == _RGB and not page.is_jfif else None,
            )
    return levels


def _is_plain(page: Any) -> bool:
    """Returns whether a page has 8-bit colour JPEG tiles, none of which is missing."""
    if not (page.is_tiled and page.compression == _JPEG and page.photometric in (_RGB, _YCBCR)):
        return False
    if page.samplesperpixel != 3 or page.bitspersample != 8 or page.planarconfig != 1:
        return False
    num_tiles = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
    return len(page.dataoffsets) == num_tiles and min(page.databytecounts, default=0) > 0

"""Folder of slides for the page, read with `wsi`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pallava.serving.slides import SlideInfo
from wsi.reader import MAX_SIDE_PX, Region, Slide, SlideError
from wsi.slide_listing import SlideListing

_Result = TypeVar("_Result")

TILE_PX = 256
"""Side of a tile of the viewer in pixels."""

_KEPT_OPEN = 4
_THUMBNAIL_PX = 1024
_MAX_READ_PX = 8192
"""Side of the largest square read from a level; it takes 200 MB as RGB."""


@dataclass
class _OpenSlide:
    """An open slide, which only one thread at a time may read."""

    slide: Slide
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_users: int = 0
    thumbnails: dict[int, Image.Image] = field(default_factory=dict)
    """Thumbnails by longer side. They are cached because every click needs one, and a slide with a
    single level must be read whole for it."""


class SlideFolder:
    """The slides below a folder; the name of a slide is its relative path.

    Names come from the network. They are looked up in the listing and never joined to a path.

    Args:
        folder: Folder of the slides. Links that point outside it are not followed.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"slides {folder}: no such folder")
        self.folder = folder.resolve()
        self._paths: dict[str, Path] = {}
        self._open: OrderedDict[Path, _OpenSlide] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Returns the names of the slides that exist now, sorted."""
        listing = SlideListing(self.folder, inside_only=True)
        self._paths = {path.relative_to(self.folder).as_posix(): path for path in listing.paths}
        return sorted(self._paths)

    def path(self, name: str) -> Path:
        """Returns the path of a slide.

        Raises:
            FileNotFoundError: If the slide is not in the listing.
        """
        if name not in self._paths:
            self.names()
        if name not in self._paths:
            raise FileNotFoundError(f"slide {name!r:.80}: not in the listing of this server")
        return self._paths[name]

    def tile(self, name: str, level: int, column: int, row: int) -> Image.Image:
        """Returns a tile of the slide's image pyramid, as viewers of deep zoom images ask for.

        Levels halve the slide's size, down to one pixel at level 0; tiles are `TILE_PX` wide, and
        narrower at the right and lower edge.

        Raises:
            FileNotFoundError: If the slide or the tile does not exist.
            ValueError: If it cannot be read.
        """
        info = self.info(name)
        longer = max(info.width_px, info.height_px)
        finest = (longer - 1).bit_length()
        scale = 1 << (finest - level) if 0 <= level <= finest else 0
        side = TILE_PX * scale
        left, top = column * side, row * side
        if not (scale and 0 <= left < info.width_px and 0 <= top < info.height_px):
            raise FileNotFoundError(f"{name}: no tile {column}, {row} at level {level}")
        width, height = (
            max(1, min(TILE_PX, round((length - start) / scale)))
            for start, length in ((left, info.width_px), (top, info.height_px))
        )
        if longer / scale <= _THUMBNAIL_PX:
            # Cached, and read from slides that hold no smaller copy of themselves.
            whole = self.thumbnail(name, _THUMBNAIL_PX)
            ratio = whole.width / info.width_px
            box = (left, top, left + width * scale, top + height * scale)
            corners = tuple(edge * ratio for edge in box)
            return whole.resize((width, height), box=_inside(corners, whole.size), reducing_gap=2)
        tile = self.region(name, left, top, side, TILE_PX)
        return tile.crop((0, 0, width, height))

    def info(self, name: str) -> SlideInfo:
        """Returns size and resolution of a slide."""

        def read(slide: Slide, _: object) -> SlideInfo:
            return SlideInfo(name, *slide.dimensions, slide.known_mpp)

        return self._use(name, read)

    def thumbnail(self, name: str, max_side_px: int) -> Image.Image:
        """Returns the whole slide as RGB, with a longer side of at most `max_side_px`."""

        def read(slide: Slide, kept: dict[int, Image.Image]) -> Image.Image:
            if max_side_px not in kept:
                kept[max_side_px] = slide.thumbnail(max_side_px)
            return kept[max_side_px].copy()

        return self._use(name, read)

    def region(
        self, name: str, left_level0: int, top_level0: int, side_level0: int, max_side_px: int
    ) -> Image.Image:
        """Returns a square region as RGB of at most `max_side_px`, white outside the slide.

        Raises:
            FileNotFoundError: If the slide is not in the listing.
            ValueError: If the region cannot be read, or only at a size that would exhaust memory.
        """
        side_px = min(side_level0, max_side_px)

        def read(slide: Slide, _: object) -> Image.Image:
            """Reads the region at the nearest finer level and pastes it into `side_px` pixels."""
            scale = side_level0 / side_px
            fitting = [own for own in slide.level_downsamples if own <= scale]
            read_px = round(side_level0 / max(fitting, default=1.0))
            if read_px > _MAX_READ_PX:
                raise ValueError(
                    f"{name}: a region of {side_level0} px would be read at {read_px} px, since "
                    "the file holds no smaller copy of itself; choose a smaller region"
                )
            # Read in pieces, because `wsi` limits the size of a region.
            pieces = -(-side_level0 // MAX_SIDE_PX)
            canvas = Image.new("RGB", (side_px, side_px))
            for row in range(pieces):
                for column in range(pieces):
                    left, top, right, bottom = (
                        round(edge * side_level0 / pieces)
                        for edge in (column, row, column + 1, row + 1)
                    )
                    x, y, end = (round(edge * side_px / pieces) for edge in (column, row, row + 1))
                    region = Region(
                        left_level0 + left, top_level0 + top, max(right - left, bottom - top),
                        max(1, end - y),
                    )  # fmt: skip
                    canvas.paste(Image.fromarray(slide.read(region)), (x, y))
            return canvas

        return self._use(name, read)

    def _close_unused(self) -> None:
        """Closes the least recently used slides, except those being read."""
        unused = [path for path, opened in self._open.items() if not opened.num_users]
        for path in unused[: max(0, len(self._open) - _KEPT_OPEN)]:
            self._open.pop(path).slide.close()

    def _use(self, name: str, read: Callable[[Slide, dict[int, Image.Image]], _Result]) -> _Result:
        """Reads from a slide while no other thread does."""
        path = self.path(name)
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = _OpenSlide(Slide(path))
                self._open.move_to_end(path)
                opened = self._open[path]
                opened.num_users += 1
            try:
                with opened.lock:
                    return read(opened.slide, opened.thumbnails)
            finally:
                with self._lock:
                    opened.num_users -= 1
                    self._close_unused()
        except SlideError as error:  # hides the path of the folder from clients
            raise ValueError(str(error).replace(str(path), name)) from error


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clips a box to an image, since the thumbnail's sides are rounded."""
    left, top = (min(start, length - 1e-3) for start, length in zip(box[:2], size, strict=True))
    right, bottom = (min(end, length) for end, length in zip(box[2:], size, strict=True))
    return left, top, right, bottom

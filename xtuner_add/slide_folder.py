"""A folder of slides for the page of `xtuner-add serve`: whole-slide files and plain images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from pallava.serving.slides import SlideInfo

_PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_BOTH = (".tif", ".tiff")
_WHOLE_SLIDE = (
    *(".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi"),
    *_BOTH,
)
_KEPT_OPEN = 4
_MAX_READ_PX = 8192  # 268 MB as RGBA


class SlideFolder:
    """The slides that lie directly in a folder; a name is looked up in its listing, never joined.

    Args:
        folder: The folder. Links that lead out of it are left out.

    Raises:
        FileNotFoundError: There is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--slides {folder}: no such folder")
        self.folder = folder.resolve()
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """What there is now, sorted."""
        return sorted(self._files())

    def info(self, name: str) -> SlideInfo:
        """Size and resolution."""
        from pallava.serving.slides import SlideInfo

        slide = self._slide(name)
        width_px, height_px = slide.dimensions
        return SlideInfo(name, width_px, height_px, _mpp(slide.properties))

    def thumbnail(self, name: str, max_side_px: int) -> Image.Image:
        """The whole slide as RGB."""
        image: Image.Image = self._slide(name).get_thumbnail((max_side_px, max_side_px))
        return image.convert("RGB")

    def region(
        self, name: str, left_level0: int, top_level0: int, side_level0: int, max_side_px: int
    ) -> Image.Image:
        """A square of the slide as RGB, shrunk to at most `max_side_px`; outside it is white."""
        from PIL import Image

        slide = self._slide(name)
        side_px = min(side_level0, max_side_px)
        level = slide.get_best_level_for_downsample(side_level0 / side_px)
        read_px = max(1, round(side_level0 / slide.level_downsamples[level]))
        if read_px > _MAX_READ_PX:
            raise ValueError(
                f"{name}: a region of {side_level0} px would be read at {read_px} px, since the "
                "file holds no smaller copy of itself; choose a smaller region"
            )
        rgba = slide.read_region((left_level0, top_level0), level, (read_px, read_px))
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white.resize((side_px, side_px), Image.Resampling.LANCZOS)

    def _files(self) -> dict[str, Path]:
        known = (*_WHOLE_SLIDE, *_PLAIN)
        return {
            path.name: path
            for path in self.folder.iterdir()
            if path.suffix.lower() in known
            and path.is_file()
            and path.resolve().is_relative_to(self.folder)
        }

    def _slide(self, name: str) -> Any:
        path = self._files().get(name)
        if path is None:
            raise FileNotFoundError(f"slide {name!r:.80}: not in the listing of this server")
        with self._lock:
            if path not in self._open:
                self._open[path] = _open_slide(path)
                if len(self._open) > _KEPT_OPEN:
                    self._open.popitem(last=False)  # closed when its last reader lets go
            self._open.move_to_end(path)
            return self._open[path]


def _open_slide(path: Path) -> Any:
    import openslide

    from pallava.images import load_image

    if path.suffix.lower() in _PLAIN:
        return openslide.ImageSlide(load_image(path))
    try:
        return openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        if path.suffix.lower() in _BOTH:  # no tiles inside: an ordinary picture
            return openslide.ImageSlide(load_image(path))
        raise ValueError(f"{path.name}: cannot be opened as a slide: {error}") from error


def _mpp(properties: Any) -> float | None:
    """Micrometres per pixel, the mean of both directions."""
    try:
        x, y = (float(properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    return (x + y) / 2 if x > 0 and y > 0 else None

"""Whole-slide images: reading, tissue detection, tiling, patch extraction; without torch."""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from wsi.extraction import OutputSettings as OutputSettings
    from wsi.extraction import extract as extract
    from wsi.reader import Region as Region
    from wsi.reader import Slide as Slide
    from wsi.reader import Slide as open_slide  # noqa: F401
    from wsi.reader import SlideError as SlideError
    from wsi.store import read_coordinates as read_coordinates
    from wsi.store import read_features as read_features
    from wsi.tile_job import TileSettings as TileSettings
    from wsi.tile_job import tile_slides as tile_slides
    from wsi.tiling import PatchSpec as PatchSpec
    from wsi.tiling import Tiling as Tiling
    from wsi.tiling import tile as tile
    from wsi.tissue import otsu_mask as otsu_mask

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "",
    {
        "OutputSettings": "wsi.extraction",
        "PatchSpec": "wsi.tiling",
        "Region": "wsi.reader",
        "Slide": "wsi.reader",
        "SlideError": "wsi.reader",
        "TileSettings": "wsi.tile_job",
        "Tiling": "wsi.tiling",
        "extract": "wsi.extraction",
        "open_slide": "wsi.reader:Slide",
        "otsu_mask": "wsi.tissue",
        "read_coordinates": "wsi.store",
        "read_features": "wsi.store",
        "tile": "wsi.tiling",
        "tile_slides": "wsi.tile_job",
    },
)

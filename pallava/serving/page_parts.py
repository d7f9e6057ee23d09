"""Texts of the page, and settings shared by its parts."""

from __future__ import annotations

import html
from typing import Any

from PIL import Image

from pallava.anyres import AnyRes
from pallava.serving.slides import SlideInfo

NOTICE = (
    "<b>For research only. Not for diagnosis.</b> The model can be wrong and sound sure. "
    "Do not use its answers in the care of a patient."
)
_SCALE = '<span class="scale">little <i></i> much attention</span>'


def picture(height_px: int, **changes: Any) -> dict[str, Any]:
    """Returns settings of a display-only picture."""
    fixed = {"interactive": False, "show_label": False, "buttons": ["fullscreen"]}
    return {**fixed, "height": height_px, **changes}


def head(name: str) -> str:
    """Returns the HTML of title, model name and disclaimer."""
    return (
        f'<div id="head"><h1>Pathology assistant</h1><span class="model">{html.escape(name)}'
        f'</span></div><div id="notice" role="note">{NOTICE}</div>'
    )


def about(info: SlideInfo, left: int = 0, top: int = 0, side: int = 0) -> str:
    """Describes a slide, and a region in level-0 pixels if one is given."""
    size = f"{info.width_px:,} x {info.height_px:,} px"
    if info.mpp is None:
        scale = "resolution unknown: the region is measured in pixels"
    else:
        width, height = (side * info.mpp / 1000 for side in (info.width_px, info.height_px))
        scale = f"{info.mpp:.3g} µm per pixel, {width:.1f} x {height:.1f} mm"
    region = f". Region: {side:,} px at ({left:,}, {top:,})" if side else ""
    return html.escape(f"{size}, {scale}{region}")


def shown_text(image: Image.Image, anyres: AnyRes, num_sub_images: int) -> str:
    """Explains how an image was split and what the attention picture means."""
    size = f"{image.width} x {image.height} px"
    if not anyres.sub_images:
        return f"{size}. This model reads the image once, shrunk to one tile, without sub-images."
    return (
        f"{_SCALE}<br>{size}, read as one thumbnail and {num_sub_images} sub-images of "
        f"{anyres.tile_px} x {anyres.tile_px} px. Attention is that of the thumbnail's tokens "
        "to the sub-images in the connector, averaged over heads and layers. It comes from the "
        "image alone, is the same for every question, and explains no answer."
    )

"""Converts images of any Pillow mode to RGB, for the processor of exported models.

The conversion is that of `pathcore.images.to_rgb`, which an exported model cannot import.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image, *, name: str = "image") -> Image.Image:
    """Converts a decoded image of any Pillow mode to 8-bit RGB.

    Args:
        image: Decoded image.
        name: Name of the image in error messages.

    Raises:
        ValueError: If floating-point pixels lie outside 0..1, or 32-bit integers outside 0..65535,
            because their scale is then unknown.

    Example:
        >>> to_rgb(Image.new("I;16", (2, 2), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion clips at 255, which turns the image white.
        grey = np.asarray(image, dtype=np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{name}: 32-bit pixels from {grey.min()} to {grey.max()} have no known scale; "
                "save the image as 8-bit RGB"
            )
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"{name}: floating-point pixels outside 0..1 have no known scale; "
                "save the image as 8-bit RGB"
            )
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")

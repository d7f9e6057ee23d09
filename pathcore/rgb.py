"""Converts images of any Pillow mode to RGB.

The file is exported with models as it stands (`pallava.release.remote_code`), so it must import
nothing of this project.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

MAX_IMAGE_PIXELS = 400_000_000
"""Maximum number of pixels of an image: 20,000 x 20,000, or 1.6 GB as Pillow stores RGB."""


class ImageError(ValueError):
    """Raised if an image cannot be used; the message names file and reason."""


def to_rgb(image: Image.Image, *, name: str = "image") -> Image.Image:
    """Converts a decoded image of any Pillow mode to 8-bit RGB.

    Args:
        image: A loaded image.
        name: Name of the image in error messages.

    Raises:
        ImageError: If the scale of the pixels is unknown, because floating-point values lie outside
            0..1 or 32-bit integers outside 0..65535.

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
            raise ImageError(
                f"{name}: 32-bit pixels from {grey.min()} to {grey.max()} have no known scale; "
                "save the image as 8-bit RGB"
            )
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ImageError(
                f"{name}: floating-point pixels outside 0..1 have no known scale; "
                "save the image as 8-bit RGB"
            )
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")

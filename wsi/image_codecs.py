"""Encodes patches as PNG, JPEG or WebP."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FORMATS = ("png", "jpg", "webp")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP_FILTER = 2  # PNG filter type: each row minus the one above
_ISAL_LEVEL = 1
_DEFAULT_QUALITY = {"jpg": 90, "webp": 90}


def encoder(image_format: str, quality: int | None = None) -> Callable[[NDArray[np.uint8]], bytes]:
    """Returns a function from RGB `(height, width, 3)` to the bytes of an image file.

    Args:
        image_format: `png` (lossless), `jpg` (without chroma subsampling) or `webp`.
        quality: Quality from 1 to 100; by default 90. 100 makes WebP lossless.

    Raises:
        ValueError: If the format is unknown, the quality is out of range or given for PNG.

    Example:
        >>> encoder("png")(np.zeros((8, 8, 3), np.uint8))[1:4]
        b'PNG'
    """
    if image_format not in FORMATS:
        raise ValueError(f"format {image_format!r}: expected one of {', '.join(FORMATS)}")
    if image_format == "png":
        if quality is not None:
            raise ValueError("quality: PNG is lossless; leave it out, or choose jpg or webp")
        return encode_png
    quality = _DEFAULT_QUALITY[image_format] if quality is None else quality
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, found {quality}")
    import imagecodecs

    if image_format == "jpg":
        # In H&E, nuclei and cytoplasm differ in colour; chroma subsampling would blur their edges.
        return lambda pixels: bytes(
            imagecodecs.jpeg8_encode(pixels, level=quality, subsampling="444")
        )
    lossless = quality == 100
    return lambda pixels: bytes(
        imagecodecs.webp_encode(pixels, level=quality, lossless=lossless, method=2)
    )


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encodes RGB as PNG with filter `up`, compressed by ISA-L in a fifth of zlib's time.

    Args:
        pixels: uint8 `(height, width, 3)`.

    Returns:
        The content of a file as in https://www.w3.org/TR/png-3, with a single IDAT chunk and filter
        type 2 in every row.
    """
    from isal import isal_zlib

    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 3 * width + 1), np.uint8)
    filtered[:, 0] = _UP_FILTER
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = isal_zlib.compress(filtered, _ISAL_LEVEL)
    chunks = []
    for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        checksum = isal_zlib.crc32(body, isal_zlib.crc32(kind))
        chunks += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)]
    return b"".join([_PNG_SIGNATURE, *chunks])

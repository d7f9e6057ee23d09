"""Explains why a file cannot be opened as a slide.

OpenSlide says "Unsupported or missing image file" for missing, empty and truncated files alike.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEAD_BYTES = 512


def is_tiff(path: Path) -> bool:
    """Returns whether a file has the signature of TIFF or BigTIFF."""
    with open(path, "rb") as file:
        return file.read(4) in _TIFF_MAGICS


def explain(path: Path) -> str | None:
    """Returns what is wrong with a file that should be a slide, or None if nothing is apparent.

    Detects missing and empty files, folders, text files and truncated TIFF files.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "no such file"
    except ValueError:  # a NUL in the name
        return "no file can have this name"
    except OSError as error:
        return error.strerror or str(error)
    if path.is_dir():
        return "is a folder"
    if status.st_size == 0:
        return "the file is empty"
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return error.strerror or str(error)
    if head[:4] in _TIFF_MAGICS:
        return _explain_tiff(path, status.st_size)
    if _is_text(head):
        return f"holds text, not an image: {head[:60].decode(errors='replace')!r}"
    return None


def _explain_tiff(path: Path, size: int) -> str | None:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            needed = 0
            for page in tiff.pages:
                assert isinstance(page, tifffile.TiffPage)
                ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=False))
                needed = max(needed, *ends)
    except (tifffile.TiffFileError, struct.error, OSError, ValueError, TypeError) as error:
        return f"a TIFF file whose directory cannot be read; truncated at {size:,} bytes? ({error})"
    if needed > size:
        return f"the file is truncated: {size:,} bytes of at least {needed:,}; fetch it again"
    return None


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-4].decode() if len(head) == _HEAD_BYTES else head.decode()
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\r\n\t\ufeff" for letter in text)

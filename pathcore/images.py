"""Reads images of any kind as 8-bit RGB, with limits on their size."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from PIL import Image

from pathcore.files import StrPath
from pathcore.rgb import MAX_IMAGE_PIXELS, ImageError, to_rgb

NETWORK_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
"""Pillow's names of the formats that `decode_image` accepts."""


IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Suffixes of the files that folders of images are searched for."""


def path_inside(folder: Path, name: object) -> Path:
    """Joins an image name from data to a folder, rejecting names that point outside it.

    Raises:
        ImageError: If the name is not text, is an absolute path elsewhere, or contains `..`.

    Example:
        >>> path_inside(Path("images"), "a/b.png").as_posix()
        'images/a/b.png'
    """
    if not isinstance(name, str) or "\0" in name or not (path := PurePath(name)).parts:
        raise ImageError(f"image: expected a file name, found {name!r:.80}")
    roots = (folder.absolute(), folder.resolve())  # the folder itself may be a symbolic link
    if path.anchor and not any(path.is_relative_to(root) for root in roots):
        raise ImageError(f"{name}: is outside the image folder {folder}")
    if ".." in re.split(r"[/\\]", name):
        raise ImageError(f"{name}: resolves to a path outside the image folder {folder}")
    return folder / name


def relative_name(folder: Path, path: Path) -> str:
    """Returns the path of a file relative to a folder, with forward slashes.

    Raises:
        ImageError: If the file is not inside the folder.
    """
    for root in (folder, folder.absolute(), folder.resolve()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    raise ImageError(f"{path}: outside the image folder {folder}")


def find_image(folder: Path, name: object, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Path:
    """Returns the path of an image, whose name in the data may lack the suffix.

    Raises:
        ImageError: If the file does not exist, or the name points outside the folder.
    """
    path = path_inside(folder, name)
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in suffixes)):
        if os.path.isfile(candidate):  # False, too, for a name that is too long
            return candidate
    raise ImageError(f"{path}: no such image file")


def image_files(folder: Path) -> list[Path]:
    """Returns the image files below a folder, sorted.

    Hidden files are skipped, because archives made on a Mac contain metadata files such as
    `._image.tif`.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def image_size(path: StrPath, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Reads width and height in pixels from the header of an image file.

    Raises:
        ImageError: If the file does not exist, is not an image, or is too large.
    """
    with _open(Path(path), max_pixels) as image:
        return image.size


def load_image(path: StrPath, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image file to 8-bit RGB.

    Transparent pixels become white, like empty glass. 16-bit grey is scaled by its full range.
    Only the first frame of an animated or multi-page file is read.

    Args:
        path: The image file.
        max_pixels: Maximum number of pixels; larger images would exhaust the memory.

    Raises:
        ImageError: If the file does not exist, is truncated, too large, or not an image.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "patch.png"
        >>> Image.new("RGBA", (224, 224), (255, 0, 0, 0)).save(file)
        >>> image = load_image(file)
        >>> image.size, image.mode, image.getpixel((0, 0))
        ((224, 224), 'RGB', (255, 255, 255))
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        return _decode(image, str(path))


def decode_image(
    data: bytes, *, name: str = "image", max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Decodes an image from an untrusted source, such as a request, to 8-bit RGB.

    Only `NETWORK_FORMATS` are accepted, because other decoders of Pillow start external programs or
    are rarely tested.

    Args:
        data: Content of an image file.
        name: Name of the image in error messages.
        max_pixels: Maximum number of pixels.

    Raises:
        ImageError: If the image is truncated, too large, or of another format.
    """
    with _open(name, max_pixels, io.BytesIO(data), NETWORK_FORMATS) as image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return to_rgb(image, name=name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types, and so do the libraries behind them
        raise ImageError(f"{name}: cannot be decoded ({_reason(error)})") from error


def is_plain(image: Image.Image) -> bool:
    """Returns whether every program reads the pixels of an image as `to_rgb` does.

    Of other images, some clip 16-bit values or show what is transparent.
    """
    return image.mode in ("RGB", "L") and "transparency" not in image.info


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """Returns an image as a `data:` URL, for pages that need no other file.

    Args:
        image: The image.
        kind: Pillow's name of the format, `PNG` or `JPEG`.
        options: Options of the format, such as `quality`.
    """
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def _open(
    path: Path | str,
    max_pixels: int,
    data: BinaryIO | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    # Pillow's limit is global to the process; it warns above the limit and raises above twice the
    # limit. It is only raised here and never lowered, so that threads do not undo each other.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(path if data is None else data, formats=formats)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(path, str(error), max_pixels)) from error
    except Exception as error:  # many types, for instance ValueError for a name with a NUL byte
        # For a stream, Pillow's message would contain its address in memory.
        reason = _reason(error) if data is None else f"none of {', '.join(formats or ())}"
        raise ImageError(f"{str(path)!r}: not a readable image ({reason})") from error
    width_px, height_px = image.size
    if width_px * height_px > max_pixels:
        image.close()
        raise ImageError(_too_large(path, f"{width_px} x {height_px} px", max_pixels))
    return image


def _too_large(path: Path | str, size: str, max_pixels: int) -> str:
    return (
        f"{path}: {size} is more than the {max_pixels:,} pixels allowed; "
        "cut the region out of the slide first, or raise max_pixels"
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

"""Images resized before a model sees them, as some published evaluations did.

Whether an image reaches the model's own preprocessing whole, shrunk, squashed to a square or padded
can move a published score, so the choice has a name and is part of what an answer depends on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from pallava.records.questions import ImageSource

_RULE = re.compile(r"(shorter|squash|pad|crop):(\d{1,5})")


def check_rule(rule: str) -> tuple[str, int]:
    """Returns kind and size in px of a rule such as `pad:224`.

    Raises:
        ValueError: If it is none of those of `resize`.
    """
    found = _RULE.fullmatch(rule)
    if not found or not int(found[2]):
        raise ValueError(
            f"image resize {rule!r}: expected shorter:N, squash:N, pad:N or crop:N, with N in px"
        )
    return found[1], int(found[2])


def resize(image: Image.Image, rule: str) -> Image.Image:
    """Resizes an RGB image with bicubic interpolation.

    Args:
        image: Image.
        rule: `shorter:N` scales the shorter side to N px, `squash:N` ignores the aspect ratio,
            `pad:N` fits the longer side and pads with black, `crop:N` scales the shorter side and
            crops the centre.

    Raises:
        ValueError: If `rule` is none of these.

    Example:
        >>> resize(Image.new("RGB", (100, 50)), "shorter:224").size
        (448, 224)
    """
    kind, size_px = check_rule(rule)
    if kind == "squash":
        return image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    if kind == "pad":
        return ImageOps.pad(image, (size_px, size_px), Image.Resampling.BICUBIC)
    if kind == "crop":
        return ImageOps.fit(image, (size_px, size_px), Image.Resampling.BICUBIC)
    scale = size_px / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class ResizedImage:
    """An image source that is resized after loading.

    Attributes:
        source: Image to resize.
        rule: See `resize`.
    """

    source: ImageSource
    rule: str

    @property
    def name(self) -> str:
        """Name of the image in the data."""
        return self.source.name

    def load(self) -> Image.Image:
        """Decodes and resizes the image; see `ImageSource.load`."""
        return resize(self.source.load(), self.rule)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Returns the identity of the source with the rule; see `ImageSource.identity`."""
        return f"{self.source.identity(digest)} {self.rule}"

"""Any-resolution input: a thumbnail plus the sub-images of the best-fitting grid.

PA-LLaVA, section III-B (doi:10.1109/BIBM62325.2024.10821785): the thumbnail shows the whole image,
and the sub-images keep the detail that downscaling loses. The grids and their order are those of
the published code, on which the released weights depend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pathcore.rgb import MAX_IMAGE_PIXELS, ImageError

GridTies = Literal["published", "largest_scale"]

TRAINING_TIES: GridTies = "largest_scale"
"""Default of training. A folder that records no rule was trained by the published one."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of CLIP's image transform (github.com/openai/CLIP)."""

GRIDS: tuple[tuple[int, int], ...] = (
    *((1, 4), (2, 2), (4, 1)),
    *((1, 5), (5, 1)),
    *((1, 6), (2, 3), (3, 2), (6, 1)),
    *((1, 7), (7, 1)),
    *((1, 8), (2, 4), (4, 2), (8, 1)),
)
"""Allowed `(columns, rows)`, 4 to 8 sub-images, in the search order of the published code."""


def choose_grid(
    width_px: int, height_px: int, tile_px: int, ties: GridTies = "published"
) -> tuple[int, int]:
    """Chooses the grid that preserves most of the image's pixels, then wastes the least canvas.

    Args:
        width_px: Width of the image.
        height_px: Height of the image.
        tile_px: Side of a sub-image.
        ties: Rule for grids that preserve and waste the same number of pixels. `published` takes
            the first in the published order, which gives every square of up to `tile_px` a 1x4
            strip, three quarters of it black; `largest_scale` takes the grid that shows the image
            largest.

    Returns:
        `(columns, rows)`.

    Raises:
        ValueError: If a side is below one pixel, or `ties` is unknown.

    Example:
        >>> choose_grid(800, 400, tile_px=224)
        (4, 2)
    """
    if min(width_px, height_px, tile_px) < 1:
        raise ValueError(
            f"image {width_px} x {height_px} px, tile {tile_px} px: expected sides of at least 1 px"
        )
    if ties not in ("published", "largest_scale"):
        raise ValueError(f"ties: expected 'published' or 'largest_scale', found {ties!r}")

    def cost(grid: tuple[int, int]) -> tuple[int, int, float]:
        canvas_w, canvas_h = grid[0] * tile_px, grid[1] * tile_px
        scale = min(canvas_w / width_px, canvas_h / height_px)
        kept = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
        return -kept, canvas_w * canvas_h - kept, -scale if ties == "largest_scale" else 0.0

    return min(GRIDS, key=cost)  # ties go to the first grid, as in the published search


def fit_to_canvas(image: Image.Image, canvas_px: tuple[int, int]) -> Image.Image:
    """Resizes an image to fit a black canvas, keeping its aspect ratio, and centres it."""
    width_px, height_px = image.size
    canvas_w, canvas_h = canvas_px
    scale_w, scale_h = canvas_w / width_px, canvas_h / height_px
    if scale_w < scale_h:
        size = (canvas_w, min(math.ceil(height_px * scale_w), canvas_h))
    else:
        size = (min(math.ceil(width_px * scale_h), canvas_w), canvas_h)
    canvas = Image.new("RGB", canvas_px, (0, 0, 0))
    offset = ((canvas_w - size[0]) // 2, (canvas_h - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), offset)
    return canvas


def pad_to_square(
    image: Image.Image,
    image_mean: Sequence[float],
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    name: str = "image",
) -> Image.Image:
    """Centres an RGB image on a square of the mean colour, as LLaVA does.

    Args:
        image: The image; a square one is returned as it is.
        image_mean: Channel means in 0..1.
        max_pixels: Maximum number of pixels of the square.
        name: Name of the image in error messages.

    Raises:
        ImageError: If the square is too large.
    """
    side = max(image.size)
    if image.width == image.height:
        return image
    if side**2 > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} px, padded to a square, are more than "
            f"the {max_pixels:,} pixels allowed"
        )
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def split_image(
    image: Image.Image, tile_px: int, ties: GridTies = "published"
) -> list[Image.Image]:
    """Splits an RGB image into its thumbnail and sub-images, row by row.

    Returns:
        `[thumbnail, sub_image_1, ...]`, each `tile_px` square, with 4 to 8 sub-images.

    Example:
        >>> len(split_image(Image.new("RGB", (800, 400)), tile_px=224))
        9
    """
    columns, rows = choose_grid(*image.size, tile_px, ties)
    canvas = fit_to_canvas(image, (columns * tile_px, rows * tile_px))
    boxes = [
        (x * tile_px, y * tile_px, (x + 1) * tile_px, (y + 1) * tile_px)
        for y in range(rows)
        for x in range(columns)
    ]
    # As in the published code, the thumbnail is squeezed into a square: the aspect ratio changes.
    thumbnail = image.resize((tile_px, tile_px), Image.Resampling.BICUBIC)
    return [thumbnail, *(canvas.crop(box) for box in boxes)]


@dataclass(frozen=True)
class AnyRes:
    """Converts an RGB image to the stack of normalised tiles that the encoder reads.

    Args:
        tile_px: Side of a tile, equal to the encoder's image size.
        image_mean: Channel means in 0..1.
        image_std: Channel standard deviations in 0..1.
        sub_images: Whether to add sub-images; False yields the thumbnail alone, for models without
            a scale-invariant connector.
        ties: See `choose_grid`.
        pad_to_square: Whether to pad images with the mean colour first.

    Example:
        >>> AnyRes(tile_px=32)(Image.new("RGB", (64, 64))).shape
        torch.Size([5, 3, 32, 32])
    """

    tile_px: int = 224
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    sub_images: bool = True
    ties: GridTies = "published"
    pad_to_square: bool = False

    @classmethod
    def from_image_processor(
        cls,
        processor: object,
        *,
        sub_images: bool = True,
        ties: GridTies = "published",
        pad_to_square: bool = False,
    ) -> AnyRes:
        """Takes tile size and channel statistics from a Hugging Face image processor.

        Raises:
            ValueError: If the processor does not state a single square size.
        """
        size = getattr(processor, "crop_size", None) or getattr(processor, "size", None)
        sides = {size.get(key) for key in ("height", "width", "shortest_edge")} if size else set()
        sides -= {None}
        if len(sides) != 1:
            raise ValueError(
                f"{type(processor).__name__}: expected one square crop_size or size, found {size!r}"
            )
        return cls(
            tile_px=int(sides.pop()),
            image_mean=tuple(getattr(processor, "image_mean", CLIP_MEAN)),
            image_std=tuple(getattr(processor, "image_std", CLIP_STD)),
            sub_images=sub_images,
            ties=ties,
            pad_to_square=pad_to_square,
        )

    def padded(self, image: Image.Image) -> Image.Image:
        """Returns an RGB image as it is tiled: padded if `pad_to_square` is set."""
        return pad_to_square(image, self.image_mean) if self.pad_to_square else image

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns `(1 + num_sub_images, 3, tile_px, tile_px)` float32, the thumbnail first.

        Raises:
            ImageError: If the padded image is too large.
        """
        image = self.padded(image)
        if self.sub_images:
            tiles = split_image(image, self.tile_px, self.ties)
        else:
            tiles = [image.resize((self.tile_px, self.tile_px), Image.Resampling.BICUBIC)]
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
        # In place and on whole rows, with the statistics repeated for each pixel: four times as
        # fast as with three values along the last dimension, and the same bits.
        rows = pixels.view(-1, 3 * self.tile_px).to(torch.float32).div_(255)
        for statistic, apply in ((self.image_mean, rows.sub_), (self.image_std, rows.div_)):
            apply(torch.tensor(statistic, dtype=torch.float32).repeat(self.tile_px))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    def num_sub_images(self, width_px: int, height_px: int) -> int:
        """Returns the number of sub-images for an image size, by which samplers group batches."""
        if not self.sub_images:
            return 0
        if self.pad_to_square:
            width_px = height_px = max(width_px, height_px)
        columns, rows = choose_grid(width_px, height_px, self.tile_px, self.ties)
        return columns * rows

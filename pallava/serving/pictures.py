"""Pictures of what the model sees of an image, and of its attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pallava.anyres import AnyRes, choose_grid, fit_to_canvas

SHOWN_PX = 840
"""Longer side of the pictures, in pixels."""

_WHITE, _INK = (255, 255, 255), (20, 24, 40)
_HEAT = np.array(
    [[24, 12, 60], [101, 21, 110], [187, 55, 84], [237, 105, 37], [252, 193, 62]], np.float32
)
"""Colour map from low to high attention, of increasing lightness to remain readable in grey."""
_VEIL = 0.72
_QUANTILE = 0.98  # clips outliers: few tokens attract much of the attention


def cut_picture(image: Image.Image, anyres: AnyRes, shown_px: int = SHOWN_PX) -> Image.Image:
    """Draws the grid of sub-images on an image, numbered in the model's reading order.

    Args:
        image: RGB image.
        anyres: Preprocessing of the model.
        shown_px: Longer side of the result in pixels.
    """
    if not anyres.sub_images:
        return fit_to_canvas(image, _fitting(image.size, shown_px))
    image = anyres.padded(image)
    columns, rows, cell_px = _grid(image, anyres, shown_px)
    canvas = fit_to_canvas(image, (columns * cell_px, rows * cell_px))
    return _with_grid(canvas, columns, rows, numbers=True)


def attention_picture(
    image: Image.Image, anyres: AnyRes, attention: Tensor, shown_px: int = SHOWN_PX
) -> Image.Image:
    """Overlays an image with the connector's attention.

    Args:
        image: RGB image.
        anyres: Preprocessing of the model.
        attention: `(num_sub_images, side, side)`, as returned by `sub_image_attention`.
        shown_px: Longer side of the result in pixels.
    """
    image = anyres.padded(image)
    columns, rows, cell_px = _grid(image, anyres, shown_px)
    canvas = fit_to_canvas(image, (columns * cell_px, rows * cell_px))
    maps = attention.float().cpu().numpy()
    side = maps.shape[-1]
    by_place = maps.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
    weights = by_place.reshape(rows * side, columns * side)
    highest = float(np.quantile(weights, _QUANTILE))
    levels = (weights / highest if highest > 0 else weights).clip(0, 1)
    veil = Image.fromarray((levels * 255).astype(np.uint8))
    smooth = _values(veil.resize(canvas.size, Image.Resampling.BICUBIC)) / np.float32(255)
    grey = _values(canvas.convert("L"))[..., None]
    strength = _VEIL * (0.35 + 0.65 * smooth[..., None])
    mixed = grey * (1 - strength) + _heat(smooth) * strength
    return _with_grid(Image.fromarray(mixed.astype(np.uint8)), columns, rows, numbers=False)


def tile_pictures(pixel_values: Tensor, anyres: AnyRes) -> list[Image.Image]:
    """Converts the encoder's input tiles back to images, the thumbnail first.

    Args:
        pixel_values: `(1 + num_sub_images, 3, S, S)`, normalised.
        anyres: Preprocessing that was applied.
    """
    mean = np.asarray(anyres.image_mean, np.float32)
    std = np.asarray(anyres.image_std, np.float32)
    pixels = pixel_values.float().cpu().numpy().transpose(0, 2, 3, 1) * std + mean
    return [Image.fromarray(tile) for tile in (pixels * 255).round().clip(0, 255).astype(np.uint8)]


def marked_picture(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Outlines a region on the thumbnail of a slide.

    Args:
        image: Thumbnail.
        box: Left, top, right and bottom as fractions of the thumbnail's sides.
    """
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    width, height = marked.size
    left, top, right, bottom = (
        round(part * length) for part, length in zip(box, (width, height) * 2, strict=True)
    )
    # A region of only a few pixels would be invisible.
    right, bottom = max(right, left + 6), max(bottom, top + 6)
    draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=_WHITE, width=2)
    draw.rectangle((left, top, right, bottom), outline=(214, 40, 57), width=3)
    return marked


def _fitting(size_px: tuple[int, int], shown_px: int) -> tuple[int, int]:
    scale = shown_px / max(size_px)
    return max(1, round(size_px[0] * scale)), max(1, round(size_px[1] * scale))


def _grid(image: Image.Image, anyres: AnyRes, shown_px: int) -> tuple[int, int, int]:
    columns, rows = choose_grid(*image.size, anyres.tile_px, anyres.ties)
    return columns, rows, shown_px // max(columns, rows)


def _values(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image).astype(np.float32)


def _heat(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(levels, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _with_grid(canvas: Image.Image, columns: int, rows: int, *, numbers: bool) -> Image.Image:
    draw = ImageDraw.Draw(canvas)
    cell_px = canvas.width // columns
    # A dark and a light line are visible on both tissue and glass.
    for colour, width_px in ((_INK, 5), (_WHITE, 3)):
        for column in range(1, columns):
            x = column * cell_px
            draw.line((x, 0, x, canvas.height), fill=colour, width=width_px)
        for row in range(1, rows):
            draw.line((0, row * cell_px, canvas.width, row * cell_px), fill=colour, width=width_px)
    if numbers:
        font = ImageFont.load_default(size=22)
        for index in range(columns * rows):
            x, y = index % columns * cell_px + 24, index // columns * cell_px + 24
            draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill=_INK, outline=_WHITE, width=2)
            draw.text((x, y), str(index + 1), fill=_WHITE, font=font, anchor="mm")
    return canvas

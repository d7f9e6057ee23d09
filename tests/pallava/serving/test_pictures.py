"""Pictures of sub-images and attention show the right positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pallava.anyres import AnyRes, choose_grid
from pallava.serving.pictures import (
    attention_picture,
    cut_picture,
    marked_picture,
    tile_pictures,
)

ANYRES = AnyRes(tile_px=32)


def half_red(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (250, 250, 250))
    image.paste((200, 0, 0), (0, 0, width // 2, height))
    return image


@pytest.mark.parametrize("size", [(64, 64), (256, 64), (70, 300)])
def test_the_cut_has_the_models_grid(size: tuple[int, int]) -> None:
    columns, rows = choose_grid(*size, 32)
    picture = cut_picture(half_red(*size), ANYRES, 400)
    cell = 400 // max(columns, rows)
    assert picture.size == (columns * cell, rows * cell)
    for column in range(1, columns):
        line = np.asarray(picture)[:, column * cell]
        assert (line == 255).all(axis=-1).mean() > 0.9
    number = np.asarray(picture.crop((8, 8, 40, 40)))
    assert (number < 60).all(axis=-1).mean() > 0.3  # the dark disc of sub-image 1


def test_a_model_without_sub_images_has_no_grid() -> None:
    plain = AnyRes(tile_px=32, sub_images=False)
    picture = cut_picture(half_red(100, 50), plain, 400)
    assert picture.size == (400, 200)
    assert np.asarray(picture)[:, 300].min() == 250


def test_an_image_is_shown_padded_if_the_model_reads_it_padded() -> None:
    padding = AnyRes(tile_px=32, pad_to_square=True)
    image = half_red(70, 300)
    picture = cut_picture(image, padding, 400)
    assert picture == cut_picture(padding.padded(image), ANYRES, 400)
    attention = torch.rand(padding.num_sub_images(*image.size), 2, 2)
    assert attention_picture(image, padding, attention, 400).size == picture.size


def test_attention_is_bright_in_the_sub_image_that_has_it() -> None:
    image = Image.new("RGB", (128, 64), (200, 200, 200))
    columns, rows = choose_grid(128, 64, 32)
    for index in range(columns * rows):
        attention = torch.full((columns * rows, 2, 2), 0.01)
        attention[index] = 1.0
        picture = attention_picture(image, ANYRES, attention, 400)
        warmth = np.asarray(picture).astype(int) @ [1, 0, -1]  # red less blue
        cell = 400 // max(columns, rows)
        means = [
            warmth[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean()
            for y in range(rows)
            for x in range(columns)
        ]
        assert int(np.argmax(means)) == index


def test_even_no_attention_can_be_drawn() -> None:
    image = half_red(128, 64)
    assert attention_picture(image, ANYRES, torch.zeros(8, 2, 2), 400).size == (400, 200)


def test_tiles_are_what_was_cut() -> None:
    image = half_red(128, 64)
    pixels = ANYRES(image)
    tiles = tile_pictures(pixels, ANYRES)
    assert len(tiles) == len(pixels)
    assert torch.allclose(AnyRes(tile_px=32, sub_images=False)(tiles[1])[0], pixels[1], atol=1e-5)


def test_a_region_is_outlined() -> None:
    image = Image.new("RGB", (200, 100), (250, 250, 250))
    marked = np.asarray(marked_picture(image, (0.5, 0.2, 0.75, 0.6)))
    red = (marked == (214, 40, 57)).all(axis=-1)
    rows, columns = np.nonzero(red)
    assert (columns.min(), columns.max()) == (100, 150)
    assert (rows.min(), rows.max()) == (20, 60)
    assert np.asarray(image).min() == 250

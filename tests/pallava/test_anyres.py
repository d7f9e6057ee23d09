"""Grids and tiles against the goldens, and invariants for images of any size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from pallava.anyres import CLIP_MEAN, GRIDS, AnyRes, choose_grid, fit_to_canvas, split_image
from pathcore.rgb import ImageError
from tests.pallava import goldens

CASES = goldens.read_json("anyres/cases.json")
sides = st.integers(1, 5000)


def golden_image(name: str) -> Image.Image:
    return Image.open(goldens.GOLDEN / "anyres" / f"{name}.png").convert("RGB")


def test_every_recorded_grid_is_chosen() -> None:
    recorded = goldens.read_json("anyres/grid_choice_224.json")
    assert len(recorded["rows"]) == 621
    assert [tuple(grid) for grid in recorded["allowed_grids_cols_rows_in_search_order"]] == list(
        GRIDS
    )
    wrong = [row for row in recorded["rows"] if choose_grid(*row[:2], 224) != tuple(row[2:])]
    assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_the_published_ones(name: str) -> None:
    case, io = CASES[name], goldens.read_tensors(f"anyres/{name}.safetensors")
    image, anyres = golden_image(name), AnyRes(tile_px=case["tile"])
    assert image.size == tuple(case["size_wh"])
    columns, rows = choose_grid(*image.size, case["tile"])
    assert [columns, rows] == case["chosen_grid_cols_rows"]
    assert anyres.num_sub_images(*image.size) == case["n_sub"]
    canvas = fit_to_canvas(image, (columns * case["tile"], rows * case["tile"]))
    assert np.array_equal(np.asarray(canvas), io["padded_rgb_uint8"].numpy())
    thumbnail = split_image(image, case["tile"])[0]
    assert np.array_equal(np.asarray(thumbnail), io["thumbnail_rgb_uint8"].numpy())
    assert torch.equal(anyres(image), io["pixel_values"])


def test_a_picture_at_full_tile_size_is_the_published_one() -> None:
    recorded = goldens.read_json("anyres/real_700x520.json")
    pixels = AnyRes()(golden_image("real_700x520"))
    assert list(pixels.shape) == recorded["shape"]
    means = pixels.flatten(1).mean(dim=1).tolist()
    assert means == pytest.approx(recorded["mean_per_tile"], abs=1e-6)
    deviations = pixels.flatten(1).std(dim=1).tolist()
    assert deviations == pytest.approx(recorded["std_per_tile"], rel=1e-5)
    assert pixels[1, 0, :4, :4].tolist() == recorded["corner_tile1_ch0_4x4"]
    digest = hashlib.sha256(pixels.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == recorded["sha256_float32_le"]


def kept_and_scale(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, float]:
    """Pixels of the image that survive in a grid of 224 px tiles, and how large it is shown."""
    canvas = grid[0] * 224, grid[1] * 224
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    shown = int(size[0] * scale) * int(size[1] * scale)
    return min(shown, size[0] * size[1]), scale


@given(width_px=sides, height_px=sides)
def test_no_grid_keeps_more_and_of_those_none_wastes_less(width_px: int, height_px: int) -> None:
    size = width_px, height_px
    chosen = choose_grid(*size, 224)
    assert chosen in GRIDS
    kept = {grid: kept_and_scale(size, grid)[0] for grid in GRIDS}
    assert kept[chosen] == max(kept.values())
    equals = [grid for grid in GRIDS if kept[grid] == kept[chosen]]
    fewest = min(columns * rows for columns, rows in equals)
    assert chosen[0] * chosen[1] == fewest
    assert chosen == next(grid for grid in equals if grid[0] * grid[1] == fewest)


@given(width_px=sides, height_px=sides)
def test_the_largest_scale_is_never_smaller_and_costs_no_more(
    width_px: int, height_px: int
) -> None:
    size = width_px, height_px
    published = choose_grid(*size, 224)
    largest = choose_grid(*size, 224, ties="largest_scale")
    assert kept_and_scale(size, largest)[0] == kept_and_scale(size, published)[0]
    assert largest[0] * largest[1] == published[0] * published[1]
    assert kept_and_scale(size, largest)[1] >= kept_and_scale(size, published)[1]


def test_a_small_square_gets_a_strip_as_published_or_a_square() -> None:
    assert choose_grid(200, 200, 224) == (1, 4)
    assert choose_grid(200, 200, 224, ties="largest_scale") == (2, 2)


@given(width_px=st.integers(1, 400), height_px=st.integers(1, 400))
def test_the_whole_picture_is_on_the_canvas(width_px: int, height_px: int) -> None:
    image = Image.new("RGB", (width_px, height_px), (255, 255, 255))
    tiles = split_image(image, 8)
    columns, rows = choose_grid(width_px, height_px, 8)
    assert {tile.size for tile in tiles} == {(8, 8)}
    assert len(tiles) == 1 + columns * rows
    assert tiles[0].getextrema() == ((255, 255),) * 3
    lit = sum(int(np.asarray(tile)[..., 0].astype(bool).sum()) for tile in tiles[1:])
    scale = min(columns * 8 / width_px, rows * 8 / height_px)
    shown = [max(1, side * scale) for side in (width_px, height_px)]
    assert int(shown[0]) * int(shown[1]) <= lit <= (shown[0] + 1) * (shown[1] + 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 2)])
def test_sizes_at_the_edge_give_whole_tiles(size: tuple[int, int]) -> None:
    pixels = AnyRes(tile_px=32)(Image.new("RGB", size, (200, 100, 150)))
    assert pixels.shape == (1 + AnyRes(tile_px=32).num_sub_images(*size), 3, 32, 32)
    assert pixels.isfinite().all()
    assert pixels[1:].std() > 0  # the picture is on the canvas, however thin


def test_statistics_and_tile_come_from_the_image_processor() -> None:
    processor = CLIPImageProcessor(
        crop_size={"height": 16, "width": 16}, image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 1, 2]
    )
    anyres = AnyRes.from_image_processor(processor)
    pixels = anyres(Image.new("RGB", (16, 16), (255, 255, 255)))
    assert pixels[0, :, 0, 0].tolist() == [1.0, 0.75, 0.5]


@pytest.mark.parametrize(
    "crop_size", [{"height": 16, "width": 24}, {"longest_edge": 16}], ids=["oblong", "longest"]
)
def test_a_processor_without_a_square_is_an_error(crop_size: dict[str, int]) -> None:
    class Processor:
        pass

    processor = Processor()
    processor.crop_size = crop_size
    with pytest.raises(ValueError, match="expected one square crop_size or size"):
        AnyRes.from_image_processor(processor)


def test_the_thumbnail_alone() -> None:
    image = golden_image("tall_3")
    alone = AnyRes(tile_px=32, sub_images=False)
    assert torch.equal(alone(image), AnyRes(tile_px=32)(image)[:1])
    assert alone.num_sub_images(*image.size) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 224), "image 0 x 5 px"),
        ((5, 5, 0), "tile 0 px"),
        ((5, 5, 224, "first"), "expected 'published' or 'largest_scale', found 'first'"),
    ],
)
def test_impossible_sizes_are_an_error(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_grid(*arguments)


@pytest.mark.parametrize("size", [(40, 120), (90, 31)])
def test_images_are_padded_with_the_mean_colour_as_in_xtuner(size: tuple[int, int]) -> None:
    from xtuner.dataset.utils import expand2square

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    square = expand2square(image, tuple(int(value * 255) for value in CLIP_MEAN))
    padding = AnyRes(32, pad_to_square=True)
    assert torch.equal(padding(image), AnyRes(32)(square))
    assert not torch.equal(padding(image)[0], AnyRes(32)(image)[0])
    assert padding.num_sub_images(*size) == len(padding(image)) - 1


def test_a_square_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(ImageError, match="1 x 30000 px, padded to a square, are more than the 400"):
        AnyRes(32, pad_to_square=True)(Image.new("RGB", (1, 30_000)))

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pallava.anyres import choose_grid
from xtuner_add.demo.histology import real_texture, stain_densities, to_rgb
from xtuner_add.demo.pallava.dataset import SHAPES_PX, plan_slides
from xtuner_add.demo.pallava.slides import SlidePlan, draw_slide
from xtuner_add.demo.tissue import CELLULAR, GLASS, PATTERNS

TILE_PX = 64


def thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    return np.asarray(small).astype(np.float32)


def plan(**changes: object) -> SlidePlan:
    base = SlidePlan(256, 128, ("glands", "mucin", "lymphoid tissue"), True, "train", 7)
    return dataclasses.replace(base, **changes)


def test_same_plan_gives_the_same_pixels_and_another_seed_others() -> None:
    first, second = draw_slide(plan(), TILE_PX), draw_slide(plan(), TILE_PX)
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, draw_slide(plan(seed=8), TILE_PX).image)


@pytest.mark.parametrize("size", [shape[:2] for shape in SHAPES_PX])
def test_look_of_nuclei_is_in_the_slide_but_not_in_its_thumbnail(size: tuple[int, int]) -> None:
    width_px, height_px = size
    two = [
        draw_slide(plan(width_px=width_px, height_px=height_px, vesicular=look), TILE_PX).image
        for look in (True, False)
    ]
    difference = np.abs(two[0].astype(np.float32) - two[1])
    hidden = np.abs(thumbnail(two[0]) - thumbnail(two[1]))
    assert difference.mean() > 3
    assert hidden.mean() < 0.5  # rounding to 8 bits


@pytest.mark.parametrize("tissue", PATTERNS)
def test_every_tissue_can_be_told_from_the_others_by_its_colours(tissue: str) -> None:
    """Mean and spread of the colours differ from those of every other kind."""

    def statistics(name: str) -> np.ndarray:
        slides = [draw_slide(plan(tissues=(name,), seed=seed), TILE_PX) for seed in range(3)]
        pixels = np.concatenate([slide.image[slide.regions != GLASS] for slide in slides])
        return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])

    own = statistics(tissue)
    for other in PATTERNS:
        if other != tissue:
            assert np.abs(own - statistics(other)).max() > 5


def test_regions_name_every_tissue_and_leave_glass() -> None:
    slide = draw_slide(plan(), TILE_PX)
    assert set(np.unique(slide.regions)) == {GLASS, 0, 1, 2}
    assert slide.image[slide.regions == GLASS].mean() > 235


def test_texture_is_real_and_train_and_held_out_share_no_pixel() -> None:
    haematoxylin, brown = stain_densities()
    assert haematoxylin.shape == brown.shape == (256, 256)
    train, held_out = real_texture("train"), real_texture("held_out")
    for kind in ("epithelium", "stroma"):
        windows = getattr(train, kind).reshape(len(getattr(train, kind)), -1)
        others = getattr(held_out, kind).reshape(len(getattr(held_out, kind)), -1)
        assert len(windows) > 50 and len(others) > 50
        assert not {row.tobytes() for row in windows} & {row.tobytes() for row in others}
    sample = train.sample("stroma", (120, 250), np.random.default_rng(0))
    assert sample.shape == (120, 250)
    assert abs(sample.mean()) < 0.3 and 0.6 < sample.std() < 1.4


def test_stains_have_their_colours() -> None:
    one, none = np.full((2, 2), 0.1, np.float32), np.zeros((2, 2), np.float32)
    blue, pink, white = to_rgb(one, none)[0, 0], to_rgb(none, one)[0, 0], to_rgb(none, none)[0, 0]
    assert blue.argmax() == 2 and pink.argmax() == 0
    assert white == pytest.approx([255, 255, 255])


def test_plans_are_balanced_and_use_different_grids() -> None:
    plans = plan_slides(200, "train", np.random.default_rng(0))
    assert sum(p.vesicular for p in plans) == 100
    assert all(set(p.tissues) & set(CELLULAR) for p in plans)
    assert all(len(set(p.tissues)) == len(p.tissues) for p in plans)
    grids = {choose_grid(p.width_px, p.height_px, TILE_PX) for p in plans}
    assert {(4, 2), (2, 4), (3, 2), (2, 3), (2, 2)} <= grids

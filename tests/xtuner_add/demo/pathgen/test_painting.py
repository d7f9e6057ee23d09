from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from wsi.reader import Region, ResolutionError, Slide
from xtuner_add.demo.pathgen import painting
from xtuner_add.demo.pathgen.dataset import Sizes, plan_all
from xtuner_add.demo.pathgen.painting import (
    BLUR,
    CLEAN,
    INK,
    TISSUES,
    PaintedSlide,
    SlidePlan,
    paint_slide,
    write_slide,
)
from xtuner_add.demo.tissue import GLASS

PLAN = SlidePlan("s", 384, 320, ("glands", "necrosis"), True, True, True, True, "train", 7)


@pytest.fixture(scope="module")
def painted() -> PaintedSlide:
    return paint_slide(PLAN)


def test_plans_use_every_tissue_about_equally_and_hold_out_the_texture() -> None:
    plans = plan_all(Sizes(), seed=1)
    for group in plans.values():
        assert all(len(set(plan.tissues)) == 4 for plan in group)
        counts = [sum(name in plan.tissues for plan in group) for name in TISSUES]
        assert max(counts) - min(counts) <= 3
        assert {plan.vesicular for plan in group} == {True, False}
    assert {plan.part for plan in plans["held_out"]} == {"held_out"}
    assert {plan.part for plan in plans["teaching"] + plans["archive"]} == {"train"}
    assert [p.name for group in plans.values() for p in group if not p.has_mpp] == ["archive_23"]
    seeds = [plan.seed for group in plans.values() for plan in group]
    assert len(set(seeds)) == len(seeds)
    assert plan_all(Sizes(), seed=1) == plans
    assert plan_all(Sizes(), seed=2) != plans


def test_the_same_plan_gives_the_same_file(painted: PaintedSlide, tmp_path: Path) -> None:
    again = paint_slide(PLAN)
    for name in ("a", "b"):
        write_slide((painted if name == "a" else again).image, tmp_path / f"{name}.tif")
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_slivers_of_tissue_can_be_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = np.full((96, 96), -1)
    pieces[10:80, 10:80], pieces[5, 5], pieces[90:92, 3:60] = 0, 1, 2
    monkeypatch.setattr(painting, "_pieces", lambda *_: (pieces, ["fat", "glands", "mucin"]))
    for seed in range(3):
        plan = SlidePlan("s", 96, 96, ("fat",), True, False, False, True, "train", seed)
        slide = paint_slide(plan)
        assert (slide.regions != GLASS).sum() == 70 * 70 + 1 + 2 * 57


def test_truth_says_what_is_painted(painted: PaintedSlide) -> None:
    assert set(np.unique(painted.regions)) == {GLASS, *map(TISSUES.index, PLAN.tissues)}
    assert set(np.unique(painted.artefacts)) == {CLEAN, BLUR, INK}
    clean = painted.artefacts == CLEAN
    bright = painted.image.min(axis=2)
    inside_glass = ndimage.binary_erosion((painted.regions == GLASS) & clean, iterations=4)
    assert bright[inside_glass].min() > 225
    edges = np.abs(ndimage.laplace(painted.image.mean(axis=2)))
    tissue = painted.regions != GLASS
    assert edges[tissue & clean].mean() > 4 * edges[tissue & (painted.artefacts == BLUR)].mean()


def test_the_file_is_a_pyramid_that_says_its_resolution(
    painted: PaintedSlide, tmp_path: Path
) -> None:
    write_slide(painted.image, tmp_path / "slide.tif")
    with Slide(tmp_path / "slide.tif") as slide:
        assert slide.dimensions == (2 * PLAN.width_px, 2 * PLAN.height_px)
        assert slide.mpp == pytest.approx(0.5)
        seen = slide.read(Region(128, 128, 256, 128)).astype(float)
    assert np.abs(seen - painted.image[64:192, 64:192]).mean() < 6
    write_slide(painted.image, tmp_path / "silent.tif", has_mpp=False)
    with Slide(tmp_path / "silent.tif") as slide, pytest.raises(ResolutionError):
        print(slide.mpp)

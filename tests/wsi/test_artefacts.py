"""Planted pen, edges, folds and blur are removed from the tissue; the tissue itself is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, gaussian_filter

from tests.wsi.real_data import real_file
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.artefacts import STEP_COLOURS, STEPS, clean_mask
from wsi.reader import Slide
from wsi.tile_job import TileSettings, tile_slides
from wsi.tiling import PatchSpec
from wsi.tissue import TissueMask, otsu_mask
from xtuner_add.cli import main

WIDTH, HEIGHT, MPP = 1536, 1152, 1.0
INKS = {"green": (30, 140, 70), "blue": (35, 60, 170), "red": (215, 30, 40), "black": (25, 25, 30)}
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def section() -> tuple[Pixels, Mask]:
    """An ellipse of pink tissue with violet nuclei on glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((HEIGHT, WIDTH, 3), (222.0, 160.0, 200.0))
    pixels += 40 * gaussian_filter(rng.standard_normal((HEIGHT, WIDTH)), 4)[..., None]
    nuclei = gaussian_filter(rng.standard_normal((HEIGHT, WIDTH)), 2.5)
    pixels[nuclei > 1.5 * nuclei.std()] = (112, 74, 150)
    pixels += rng.normal(0, 4, pixels.shape)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    inside = np.hypot(rows / HEIGHT - 0.5, columns / WIDTH - 0.5) < 0.42
    pixels[~inside] = 243
    return pixels.clip(0, 255).astype(np.uint8), inside


def line(points: Sequence[tuple[float, float]], width: int) -> Mask:
    image = Image.new("1", (WIDTH, HEIGHT))
    corners = [(x * WIDTH, y * HEIGHT) for x, y in points]
    ImageDraw.Draw(image).line(corners, fill=1, width=width, joint="curve")
    return np.asarray(image)


def cleaned(
    folder: Path, pixels: Pixels, steps: Sequence[str], mpp: float = MPP
) -> tuple[TissueMask, TissueMask, dict[str, Mask]]:
    path = write_svs(folder / "slide.svs", pixels, mpp=mpp, downsamples=(), quality=95)
    with Slide(path) as slide:
        before = otsu_mask(slide)
        return before, *clean_mask(slide, before, steps)


def check(planted: Mask, before: TissueMask, after: TissueMask, least: float) -> None:
    """Of what was planted, at least this share is gone; of the rest, except a margin, nothing."""
    there = planted & before.mask
    assert there.sum() > 2000
    assert (there & ~after.mask).sum() >= least * there.sum()
    rest = before.mask & ~binary_dilation(planted, iterations=45)
    assert (rest & ~after.mask).sum() <= 0.002 * rest.sum()


@pytest.mark.parametrize("ink", INKS)
def test_pen(ink: str, section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    stroke = line([(0.15, 0.35), (0.5, 0.4), (0.8, 0.3)], 60)
    pixels = section[0].astype(float)
    pixels[stroke] = 0.2 * pixels[stroke] + 0.8 * np.array(INKS[ink])
    before, after, changes = cleaned(tmp_path, pixels.astype(np.uint8), ("pen", "edge"))
    check(stroke, before, after, 0.98)
    assert (changes["pen"].sum() > changes["edge"].sum()) == (ink != "black")


def test_dark_margin(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    margin = np.zeros((HEIGHT, WIDTH), bool)
    margin[:, :60] = True
    pixels = section[0].copy()
    # Saturated enough for Otsu's threshold, as dark pixels are.
    pixels[margin] = (48, 34, 52)
    before, after, changes = cleaned(tmp_path, pixels, ("edge",))
    check(margin, before, after, 0.98)
    assert changes["edge"].sum() >= 0.98 * (margin & before.mask).sum()


def test_fold(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    fold = line([(0.2, 0.3), (0.5, 0.55), (0.75, 0.6)], 60) & section[1]
    pixels = section[0].astype(float)
    doubled = np.roll(section[0], (165, 109), (0, 1))
    pixels[fold] *= doubled[fold] / 243
    before, after, _ = cleaned(tmp_path, pixels.astype(np.uint8), ("fold",))
    check(fold, before, after, 0.85)


def test_a_dark_follicle_is_no_fold(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = section[0].copy()
    pixels[np.hypot(rows - 576, columns - 700) < 180] = (112, 74, 150)
    before, after, _ = cleaned(tmp_path, pixels, ("fold",))
    np.testing.assert_array_equal(before.mask, after.mask)


def test_blur(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    half = np.zeros((HEIGHT, WIDTH), bool)
    half[:, : WIDTH // 2] = True
    pixels = section[0].copy()
    soft = gaussian_filter(section[0].astype(np.float32), (2.5, 2.5, 0))
    pixels[half] = soft.astype(np.uint8)[half]
    before, after, _ = cleaned(tmp_path, pixels, ("blur",))
    check(half & section[1], before, after, 0.98)


def test_specks_and_holes_but_no_refilled_pen(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]

    def disc(row: int, column: int, radius: int) -> Mask:
        return np.hypot(rows - row, columns - column) < radius

    small_hole, large_hole = disc(400, 700, 60), disc(700, 800, 150)
    small_piece, large_piece, ink = disc(60, 60, 40), disc(90, 1400, 85), disc(400, 1000, 100)
    pixels = section[0].copy()
    pixels[small_hole | large_hole] = 243
    pixels[small_piece | large_piece] = (222, 160, 200)
    pixels[ink] = INKS["green"]
    _, after, changes = cleaned(tmp_path, pixels, ("holes", "specks", "pen"))
    assert list(changes) == ["pen", "specks", "holes"]  # the order of the steps, not of the request
    assert after.mask[small_hole].all() and not after.mask[disc(700, 800, 140)].any()
    assert not after.mask[disc(60, 60, 45)].any() and after.mask[disc(90, 1400, 80)].all()
    assert not after.mask[ink].any()


@pytest.mark.parametrize("part", [1, 4])
def test_real_tissue_stays(tmp_path: Path, part: int) -> None:
    """Immunohistochemistry, at its resolution and as in an overview of a large slide."""
    before, _, changes = cleaned(tmp_path, tissue_pixels(1536, 1152)[::part, ::part], STEPS[:4])
    removed = np.any(list(changes.values()), axis=0).sum()
    assert removed <= 0.002 * before.mask.sum()


def test_a_real_section_stays() -> None:
    with Slide(real_file("slides/small_HE.svs")) as slide:
        for side in (2048, 300, 150):
            before = otsu_mask(slide, max_side_px=side)
            _, changes = clean_mask(slide, before, STEPS[:4])
            assert np.any(list(changes.values()), axis=0).sum() <= 0.002 * before.mask.sum()


def test_a_coarse_slide_cannot_be_tested_for_blur(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 um per pixel; blur can be told up to 1\.2, leave out"):
        cleaned(tmp_path, tissue_pixels(400, 300), ("blur",), mpp=2.0)


def test_the_job_records_and_draws_the_steps(section: tuple[Pixels, Mask], tmp_path: Path) -> None:
    stroke = line([(0.15, 0.35), (0.8, 0.3)], 60)
    pixels = section[0].copy()
    pixels[stroke] = INKS["green"]
    slide = write_svs(tmp_path / "slides" / "a.svs", pixels, mpp=MPP, downsamples=())
    arguments = ["tile", str(slide.parent), "--mpp", "1", "--patch-px", "64", "--quiet"]
    arguments += ["--workers", "1", "--output"]
    for name, more in (("plain", []), ("clean", ["--clean", "holes,pen"])):
        result = CliRunner().invoke(main, [*arguments, str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
    plain, clean = (
        json.loads((tmp_path / name / "manifest.jsonl").read_text()) for name in ("plain", "clean")
    )
    assert "removed_mm2" not in plain and plain["patches"] > clean["patches"]
    assert list(clean["removed_mm2"]) == ["pen"]
    covered = (stroke.sum() / 1e6, binary_dilation(stroke, iterations=45).sum() / 1e6)
    assert covered[0] * 0.9 < clean["removed_mm2"]["pen"] < covered[1]
    assert clean["added_mm2"] >= 0
    picture = np.asarray(Image.open(tmp_path / "clean" / "overlays" / "a.jpg"), int)
    assert len(picture) == HEIGHT + 2 * 18  # a line of the legend per step
    expected = 0.6 * np.array(STEP_COLOURS["pen"]) + 0.4 * np.array(INKS["green"])
    seen = picture[36:][stroke]
    assert (np.abs(np.median(seen, axis=0) - expected) < 12).all()


def test_running_again_with_other_steps_is_refused(tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "a.svs", tissue_pixels(400, 300), mpp=0.5)
    spec = PatchSpec(64, 0.5)
    for _ in range(2):
        tile_slides(slide, tmp_path / "out", TileSettings(spec, clean=("pen",)), progress=False)
    with pytest.raises(ValueError, match="clean"):
        tile_slides(slide, tmp_path / "out", TileSettings(spec), progress=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clean", "pen,ink"], "'ink' is no step; known are all, pen, edge, fold, blur"),
        (["--clean", "all", "--whole-slide"], "--clean and --whole-slide exclude each other"),
    ],
)
def test_wrong_use(more: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["tile", str(tmp_path), "--output", str(tmp_path / "out"), *more]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())

"""The original's tiler: parity with every golden, and its bugs, available by name."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from gigapath.pipeline import tile_one_slide
from gigapath.published.tiling import (
    Box,
    assemble,
    bounding_box,
    cut,
    foreground_threshold,
    grid,
    luminance,
    occupancies,
)
from tests.wsi.real_data import real_file
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import SlideError

GOLDEN = Path(__file__).parents[2] / "golden" / "gigapath" / "tiling"
TILING = json.loads((GOLDEN / "tiling.json").read_text())
END_TO_END = json.loads((GOLDEN / "end_to_end.json").read_text())
OTSU_STEP = 0.125  # float16's, at 184; numpy 1.26 and 2 round Otsu's threshold differently


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def image_of(name: str) -> NDArray[np.uint8]:
    if name == "ihc":
        return data.immunohistochemistry()
    if name == "canvas":
        canvas = np.full((1400, 1100, 3), 245, np.uint8)
        canvas[131:643, 207:719] = image_of("ihc")
        canvas[700:956, 450:706] = image_of("01581x_25327y")
        canvas[956:1212, 450:706] = image_of("01581x_25583y")
        return canvas
    return np.asarray(Image.open(real_file(f"gigapath/{name}.png")).convert("RGB"))


@pytest.mark.parametrize("case", TILING["tile_array"][:-1], ids=lambda c: f"{c['h']}x{c['w']}")
def test_grid_and_assembly(case: dict[str, Any]) -> None:
    height, width, side = case["h"], case["w"], case["tile"]
    coords = grid(width, height, side)
    assert coords.tolist() == case["coords"]
    image = np.arange(height * width * 3).reshape(height, width, 3)
    whole, offset = assemble(cut(image, coords, side), coords)
    assert offset.tolist() == case["offset"]
    axes = (2, 0, 1) if case["channels_first"] else (0, 1, 2)
    assert [whole.shape[axis] for axis in axes] == case["assembled_shape"]
    x, y = offset.tolist()
    assert np.array_equal(whole[y : y + height, x : x + width], image)
    whole[y : y + height, x : x + width] = 255
    assert (whole == 255).all()


def test_assembly_with_holes() -> None:
    case = TILING["tile_array"][-1]
    image = np.arange(144).reshape(12, 12)
    coords = grid(12, 12, 4)[case["partial"]]
    whole, offset = assemble(cut(image, coords, 4), coords, fill=case["fill"])
    assert whole.tolist() == case["assembled"]
    assert offset.tolist() == case["offset"]
    with pytest.raises(ValueError, match="4 tiles and 3 coordinates"):
        assemble(cut(image, coords, 4), coords[:3])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20))
def test_grid_covers_every_pixel_once(width: int, height: int, side: int) -> None:
    coords = grid(width, height, side)
    whole, (x, y) = assemble(cut(np.ones((height, width)), coords, side, fill=0), coords)
    assert whole.sum() == width * height
    assert whole[y : y + height, x : x + width].all()
    assert len(coords) == -(-width // side) * -(-height // side)


def test_luminance_of_the_original() -> None:
    examples = TILING["luminance_examples"]
    rgb = np.array(examples["rgb"], np.uint8)
    assert luminance(rgb, "published").astype(float).tolist() == examples["f16"]
    assert luminance(rgb).tolist() == pytest.approx(rgb.mean(axis=1), abs=1e-4)


@pytest.mark.parametrize("case", TILING["foreground"], ids=lambda case: case["image"])
def test_foreground(case: dict[str, Any]) -> None:
    image = image_of(case["image"])
    assert digest(image) == case["sha256"]
    values = luminance(image, "published")
    assert digest(values) == case["lum_sha256_f16"]
    threshold = foreground_threshold(values)
    assert float(threshold) == pytest.approx(case["otsu"], abs=OTSU_STEP)
    tissue = values < threshold
    assert digest(tissue) == case["fg_sha256"]
    assert bounding_box(tissue) == Box(*case["bbox_xywh"])
    exact = luminance(image) < foreground_threshold(luminance(image))
    assert (exact != tissue).mean() < 0.01


@pytest.mark.parametrize(
    "case",
    TILING["generate_tiles"],
    ids=lambda c: f"{c['image']}-{c['tile']}-{c['occupancy_threshold']}-{c['threshold_given']}",
)
def test_tiles_with_tissue(case: dict[str, Any]) -> None:
    image, side = image_of(case["image"]), case["tile"]
    coords = grid(image.shape[1], image.shape[0], side)
    tiles = cut(image, coords, side)
    dark = luminance(tiles, "published") < np.float16(case["foreground_threshold"])
    published = occupancies(dark, "published")
    kept = published > case["occupancy_threshold"]
    assert [str(float(share)) for share in published[kept]] == case["occupancy_f16"]
    assert coords[kept].tolist() == case["locations_xy"]
    assert (len(coords), int(kept.sum())) == (case["n_total"], case["n_kept"])
    assert digest(np.moveaxis(tiles[kept], -1, 1)) == case["tiles_sha256"]
    exact = occupancies(dark)
    assert np.array_equal(exact > case["occupancy_threshold"], kept)
    assert exact[kept].tolist() == pytest.approx(case["occupancy_exact"], abs=6e-5)


def test_occupancy_overflows_in_the_original_alone() -> None:
    for case in TILING["occupancy_f16"]:
        side = case["tile"]
        dark = np.zeros(side * side, bool)
        dark[: round(case["true"] * side * side)] = True
        dark = dark.reshape(1, side, side)
        assert str(float(occupancies(dark, "published")[0])) == case["f16"]
        assert occupancies(dark)[0] == case["true"]


@pytest.mark.parametrize(
    "case", END_TO_END["cases"], ids=lambda c: f"{c['level']}-{c['tile_size']}"
)
def test_end_to_end(case: dict[str, Any], tmp_path: Path) -> None:
    arguments = dict(level=case["level"], tile_size=case["tile_size"], progress=False)
    folder = tile_one_slide(
        GOLDEN / "slide.tiff",
        tmp_path / "published",
        coordinates="published",
        arithmetic="published",
        **arguments,
    )
    assert folder == tmp_path / "published" / "output" / "slide.tiff"
    with (folder / "dataset.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == case["columns"]
    assert [int(row["tile_x"]) for row in rows] == case["tile_x"]
    assert [int(row["tile_y"]) for row in rows] == case["tile_y"]
    assert [row["occupancy"] for row in rows] == case["occupancy"]
    assert [row["image"] for row in rows] == case["image"]
    images = [np.asarray(Image.open(folder.parent / name)) for name in case["image"]]
    hashes = case["tile_png_pixels_sha256"]
    assert [digest(image)[:16] for image in images] == hashes

    mended = tile_one_slide(GOLDEN / "slide.tiff", tmp_path / "mended", **arguments)
    with (mended / "dataset.csv").open() as file:
        rows = list(csv.DictReader(file))
    places = [[int(row["tile_x"]), int(row["tile_y"])] for row in rows]
    assert places == case["correct_level0_xy"]
    images = [np.asarray(Image.open(mended.parent / row["image"])) for row in rows]
    assert [digest(image)[:16] for image in images] == hashes
    assert (mended / "failed_tiles.csv").read_text().split() == ["tile_id"]
    assert {p.name for p in (tmp_path / "mended" / "thumbnails").iterdir()} == {
        f"slide.tiff_{kind}.png" for kind in ("original", "roi", "roi_tiles")
    }


def test_coordinates_name_the_place_of_the_pixels(tmp_path: Path) -> None:
    pixels = tissue_pixels(900, 700, blank=0.3)
    slide = write_svs(tmp_path / "s.svs", pixels, mpp=0.5, downsamples=(2,), quality=100)
    folder = tile_one_slide(slide, tmp_path / "out", tile_size=128, progress=False)
    names = sorted(p.stem for p in folder.glob("*.png"))
    assert len(names) > 10
    inside = 0
    for name in names:
        x, y = (int(part[:-1]) for part in name.split("_"))
        tile = np.asarray(Image.open(folder / f"{name}.png")).astype(int)
        place = pixels[max(y, 0) : y + 128, max(x, 0) : x + 128].astype(int)
        if place.shape == tile.shape and (tile != 255).any(axis=-1).all():
            assert np.abs(tile - place).mean() < 5
            inside += 1
    assert inside > 5


def test_tiles_of_another_slide_of_this_name_are_refused(tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(400, 300), mpp=0.5)
    folder = tile_one_slide(slide, tmp_path / "out", tile_size=64, progress=False)
    assert tile_one_slide(slide, tmp_path / "out", tile_size=64) == folder
    write_svs(slide, tissue_pixels(400, 300, seed=5), mpp=0.5)
    with pytest.raises(ValueError, match="tiles of another slide of this name; remove it"):
        tile_one_slide(slide, tmp_path / "out", tile_size=64)


def test_a_resolution_instead_of_a_level(tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(800, 800), mpp=0.25, downsamples=(2,))
    options = dict(tile_size=64, progress=False)
    by_level = tile_one_slide(slide, tmp_path / "level", level=1, **options)  # type: ignore[arg-type]
    by_mpp = tile_one_slide(slide, tmp_path / "mpp", mpp=0.5, **options)  # type: ignore[arg-type]
    assert sorted(p.name for p in by_level.iterdir()) == sorted(p.name for p in by_mpp.iterdir())
    with pytest.raises(ValueError, match=r"level 1 and mpp 0\.5: give one"):
        tile_one_slide(slide, tmp_path / "both", level=1, mpp=0.5)
    with pytest.raises(ValueError, match="level 7; it has 0 to 1"):
        tile_one_slide(slide, tmp_path / "seven", level=7)


def test_tiles_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(600, 500), mpp=0.5)
    arguments = dict(tile_size=128, progress=False)
    out = tmp_path / "out" / "output" / "s.svs"
    import gigapath.pipeline as pipeline

    calls = iter(range(100))

    def fail_at_third(pixels: NDArray[np.uint8]) -> bytes:
        if next(calls) == 3:
            raise OSError("no space left")
        return original(pixels)

    original = pipeline.encode_png
    monkeypatch.setattr(pipeline, "encode_png", fail_at_third)
    with pytest.raises(OSError, match="no space left"):
        tile_one_slide(slide, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not list(out.parent.iterdir())
    monkeypatch.setattr(pipeline, "encode_png", original)
    with monkeypatch.context() as patch, pytest.raises(TypeError):  # stopped at the thumbnails
        patch.setattr(pipeline, "draw_patches", None)
        tile_one_slide(slide, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not list(out.parent.iterdir())
    assert tile_one_slide(slide, tmp_path / "out", **arguments) == out  # type: ignore[arg-type]
    assert len(list((tmp_path / "out" / "thumbnails").iterdir())) == 3
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    tile_one_slide(slide, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(ValueError, match=r"other settings, \{'tile_size': 128\}"):
        tile_one_slide(slide, tmp_path / "out", tile_size=64)
    (out / "tiling.json").unlink()
    with pytest.raises(ValueError, match="tiles of the original, whose coordinates"):
        tile_one_slide(slide, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    next(out.glob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ images of dataset.csv are not there"):
        tile_one_slide(slide, tmp_path / "out", **arguments)  # type: ignore[arg-type]


def test_slides_without_tissue_and_without_slide(tmp_path: Path) -> None:
    glass = tmp_path / "glass.png"
    Image.fromarray(np.full((600, 600, 3), 243, np.uint8)).save(glass)
    with pytest.raises(ValueError, match="no tissue: every pixel is the same"):
        tile_one_slide(glass, tmp_path / "out")
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(SlideError, match=r"text\.svs"):
        tile_one_slide(tmp_path / "text.svs", tmp_path / "out")
    with pytest.raises(ValueError, match="slide_file and save_dir are needed"):
        tile_one_slide()
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(600, 500), mpp=0.5)
    with pytest.raises(ValueError, match="holds more tissue than 1 of"):
        tile_one_slide(slide, tmp_path / "out", occupancy_threshold=1, progress=False)
    assert not list((tmp_path / "out" / "output").iterdir())

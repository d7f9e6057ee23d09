"""Tissue masks and the grid over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests.wsi.slides import spoil_tile, tissue_pixels, write_svs
from wsi.reader import ResolutionError, Slide, SlideError
from wsi.report import draw_patches
from wsi.store import read_coordinates
from wsi.tile_job import TileSettings, tile_slides
from wsi.tiling import PatchSpec, tile
from wsi.tissue import TissueMask, geojson_mask, image_mask, otsu_mask

WIDTH, HEIGHT = 2000, 1200


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = tissue_pixels(WIDTH, HEIGHT, blank=0.5)
    return write_svs(tmp_path_factory.mktemp("slides") / "half.svs", pixels, mpp=0.25)


@pytest.fixture
def slide(slide_path: Path) -> Slide:
    return Slide(slide_path)


def test_otsu_finds_the_half_with_tissue(slide: Slide) -> None:
    mask = otsu_mask(slide, max_side_px=500)
    assert mask.mask.shape == (300, 500)
    assert mask.mask[:, :240].mean() < 0.01
    assert mask.mask[:, 260:].mean() > 0.4  # the section has pale spaces too


@pytest.mark.parametrize("value", [255, 243, 0, 128])
def test_bare_glass_has_no_tissue(tmp_path: Path, value: int) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(-2, 3, (400, 400, 1)).repeat(3, 2)
    pixels = np.clip(np.full((400, 400, 3), value) + noise, 0, 255).astype(np.uint8)
    write_svs(tmp_path / "bare.svs", pixels)
    with Slide(tmp_path / "bare.svs") as slide:
        assert otsu_mask(slide).fraction < 0.01


def test_a_section_that_fills_the_slide_is_tissue_everywhere(tmp_path: Path) -> None:
    """Otsu divides any picture in two; here both halves are tissue, with a few pale holes."""
    for seed in range(3):
        generator = np.random.default_rng(seed)
        saturation = np.clip(generator.normal(100, 45, (16, 16, 1)), 20, 235).repeat(64, 0)
        pixels = np.full((1024, 1024, 3), 235.0)
        pixels[..., 1:2] = 235 - saturation.repeat(64, 1)
        pixels[:80, :80] = 243
        path = write_svs(tmp_path / f"{seed}.svs", pixels.astype(np.uint8), mpp=0.5)
        with Slide(path) as full:
            mask = otsu_mask(full)
            assert mask.fraction > 0.97
            assert not mask.mask[10:60, 10:60].any()
            assert len(tile(full, PatchSpec(256, 0.5), mask).coords) == 16


def test_yellowish_glass_is_no_tissue(tmp_path: Path) -> None:
    pixels = tissue_pixels(800, 600)
    pixels[:, :500] = (235, 228, 200)
    with Slide(write_svs(tmp_path / "y.svs", pixels, mpp=0.5)) as yellow:
        mask = otsu_mask(yellow)
    assert mask.mask[:, :480].mean() < 0.01 and mask.mask[:, 520:].mean() > 0.4


@pytest.mark.parametrize("tile_px", [256, 240])
def test_a_damaged_tile_spoils_only_the_patches_on_it(tmp_path: Path, tile_px: int) -> None:
    pixels = tissue_pixels(1100, 900)
    path = write_svs(tmp_path / "s.svs", pixels, mpp=0.5, downsamples=(), tile=tile_px)
    spoil_tile(path, 6)  # the second tile of the second row
    spec = PatchSpec(64, 0.5, min_tissue=0.1)
    out = tmp_path / "out"
    for name, options in (("otsu", {}), ("whole", {"whole_slide": True})):
        settings = TileSettings(spec, **options)
        report = tile_slides(path, out / name, settings, progress=False)
        assert (report.written, report.incomplete) == (1, {"tiles that cannot be read": 1})
        assert report.exit_code == 3
        (row,) = map(json.loads, (out / name / "manifest.jsonl").open())
        coords = read_coordinates(out / name / row["file"]).coords
        lost = [tuple(entry["position"]) for entry in row["damaged"]]
        assert lost and all("corrupt" in entry["detail"] for entry in row["damaged"])
        low, high = tile_px - 64, 2 * tile_px
        on_tile = {(x, y) for x in range(0, 1100, 64) for y in range(0, 900, 64)
                   if low < x < high and low < y < high}  # fmt: skip
        assert set(lost) <= on_tile
        assert not on_tile & set(map(tuple, coords.tolist()))
        if name == "whole":
            assert set(lost) == on_tile and len(coords) + len(lost) == 17 * 14
    with Slide(path) as slide:
        overview = slide.overview(2048)
    first, last = tile_px, 2 * tile_px
    assert overview.damaged[first:last, first:last].all()
    assert overview.damaged.sum() < 1.6 * tile_px**2
    assert (np.asarray(overview.image)[overview.damaged] == 255).all()


def test_a_slide_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", tissue_pixels(400, 300), downsamples=())
    for number in range(4):
        spoil_tile(path, number)
    with Slide(path) as slide, pytest.raises(SlideError, match="no part of the slide can be read"):
        slide.thumbnail(100)


@settings(max_examples=60, deadline=None)
@given(
    patch_px=st.integers(8, 400),
    overlap=st.floats(0, 0.9),
    mpp=st.sampled_from([0.25, 0.5, 0.6, 1.0]),
    over_edge=st.booleans(),
)
def test_the_grid_covers_and_stays_inside(
    slide_path: Path, patch_px: int, overlap: float, mpp: float, over_edge: bool
) -> None:
    spec = PatchSpec(patch_px, mpp, int(overlap * patch_px), over_edge=over_edge)
    with Slide(slide_path) as slide:
        tiling = tile(slide, spec)
    size = tiling.size_level0
    assert size == round(patch_px * mpp / 0.25)
    assert len(np.unique(tiling.coords, axis=0)) == len(tiling.coords)
    ends = tiling.coords + size
    if over_edge:
        assert (ends.max(0) >= [WIDTH, HEIGHT]).all()
        assert (tiling.coords < [WIDTH, HEIGHT]).all()
    elif len(tiling.coords):
        step = round((patch_px - spec.overlap_px) * mpp / 0.25)
        assert (ends <= [WIDTH, HEIGHT]).all()
        assert (ends.max(0) + step > [WIDTH, HEIGHT]).all()
        for axis in (0, 1):
            assert set(np.diff(np.unique(tiling.coords[:, axis]))) <= {step}
    else:
        assert size > min(WIDTH, HEIGHT)


def test_only_patches_with_enough_tissue(slide: Slide) -> None:
    mask = otsu_mask(slide)
    few, many = (tile(slide, PatchSpec(100, 0.5, min_tissue=t), mask) for t in (0.9, 0.0))
    assert 0 < len(few.coords) < len(many.coords) < len(tile(slide, PatchSpec(100, 0.5)).coords)
    assert few.coords[:, 0].min() >= WIDTH // 2 - 60
    assert {tuple(c) for c in few.coords} <= {tuple(c) for c in many.coords}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_fractions_are_those_of_counting(seed: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    mask = TissueMask(generator.random((40, 70)) < 0.4, (70, 40))
    coords = generator.integers(-20, 70, (30, 2))
    padded = np.zeros((40 + 200, 70 + 200), bool)
    padded[100:140, 100:170] = mask.mask
    expected = [
        padded[100 + y : 100 + y + size, 100 + x : 100 + x + size].mean() for x, y in coords
    ]
    assert np.allclose(mask.fractions(coords, size), expected)


def test_outlines_of_the_user_with_holes_and_islands(tmp_path: Path, slide: Slide) -> None:
    def ring(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]

    lake = {
        "type": "Polygon",
        "coordinates": [ring(200, 200, 1000, 1000), ring(400, 400, 800, 800)],
    }
    island = {"type": "Polygon", "coordinates": [ring(500, 500, 700, 700)]}
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in (island, lake)]
    path = tmp_path / "outlines.geojson"
    for value in ({"type": "FeatureCollection", "features": features}, features):
        path.write_text(json.dumps(value))
        mask = geojson_mask(path, slide)
        points = {(300, 300): True, (450, 450): False, (600, 600): True, (1100, 300): False}
        for (x, y), tissue in points.items():
            found = mask.fractions(np.array([[x, y]]), 20)[0] > 0.5
            assert found == tissue, (x, y)
        expected = (800**2 - 400**2 + 200**2) / (WIDTH * HEIGHT)
        assert mask.fraction == pytest.approx(expected, rel=0.02)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path, slide: Slide) -> None:
    Image.new("L", (200, 120), 255).save(tmp_path / "good.png")
    Image.new("L", (120, 200), 255).save(tmp_path / "turned.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.geojson").write_text("{")
    (tmp_path / "point.geojson").write_text('{"type": "Point", "coordinates": [1, 2]}')
    assert image_mask(tmp_path / "good.png", slide).fraction == 1
    for name, message in (("turned.png", "another shape"), ("text.png", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            image_mask(tmp_path / name, slide)
    for name, message in (("text.geojson", "no GeoJSON"), ("point.geojson", "no polygon")):
        with pytest.raises(ValueError, match=message):
            geojson_mask(tmp_path / name, slide)
    with pytest.raises(FileNotFoundError):
        image_mask(tmp_path / "absent.png", slide)


def test_masks_in_alpha_channels_and_jpeg(tmp_path: Path, slide: Slide) -> None:
    shape = Image.new("L", (400, 240))
    ImageDraw.Draw(shape).ellipse((40, 30, 300, 200), fill=255)
    expected = np.asarray(shape) > 0
    shape.convert("P").save(tmp_path / "palette.png", transparency=0)
    shape.save(tmp_path / "grey.jpg", quality=75)
    Image.merge("LA", (Image.new("L", shape.size, 255), shape)).save(tmp_path / "grey.png")
    painted = Image.new("RGBA", shape.size, (255, 255, 255, 0))
    painted.paste((255, 0, 0, 90), mask=shape)
    painted.save(tmp_path / "painted.png")
    Image.merge("RGBA", (*[shape] * 3, Image.new("L", shape.size, 255))).save(tmp_path / "full.png")
    shape.save(tmp_path / "jpeg.tif", compression="jpeg")
    for name in ("palette.png", "grey.png", "painted.png", "full.png", "grey.jpg", "jpeg.tif"):
        found = image_mask(tmp_path / name, slide).mask
        most = 0.002 * expected.sum() if "j" in name else 0
        assert (found != expected).sum() <= most, name
    Image.new("L", shape.size).save(tmp_path / "black.jpg")
    assert image_mask(tmp_path / "black.jpg", slide).fraction == 0


def test_wrong_specs(slide: Slide, tmp_path: Path) -> None:
    for arguments, message in (
        ({"patch_px": 0}, "patch_px"),
        ({"mpp": -1}, "mpp"),
        ({"overlap_px": 256}, "overlap_px: expected 0 to 255"),
        ({"min_tissue": 1.5}, "min_tissue"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchSpec(**{"patch_px": 256, "mpp": 0.5, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Ask for --mpp 0\.25 or more"):
        tile(slide, PatchSpec(256, 0.1))
    write_svs(tmp_path / "unknown.svs", tissue_pixels(300, 300), mpp=None, magnification=None)
    with Slide(tmp_path / "unknown.svs") as unknown, pytest.raises(ResolutionError):
        tile(unknown, PatchSpec(64, 0.5))


def test_the_picture_shows_patches_and_tissue(slide: Slide) -> None:
    mask = otsu_mask(slide)
    coords = np.array([[100, 100], [1200, 600]])
    plain = np.asarray(slide.thumbnail(1000))
    drawn = np.asarray(draw_patches(slide, coords, 400, mask=mask, max_side_px=1000))
    assert drawn.shape == plain.shape
    assert tuple(drawn[50, 120]) == tuple(drawn[300, 650]) == (20, 60, 220)
    assert (drawn[100:200, 100:200] == plain[100:200, 100:200]).all()
    assert (drawn != plain).any(2)[:, 480:520].sum() > 300  # the tissue's outline


def test_a_mask_that_was_drawn_anew_places_other_patches(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", tissue_pixels(400, 400), mpp=0.5)
    masks = tmp_path / "masks"
    masks.mkdir()
    settings = TileSettings(PatchSpec(100, 0.5), masks=str(masks))
    for white, expected in ((400, 16), (100, 4), (100, 4)):
        mask = Image.new("L", (400, 400))
        mask.paste(255, (0, 0, white, 400))
        mask.save(masks / "s.bmp")  # always of one size
        tile_slides(path, tmp_path / "out", settings, progress=False)
        assert len(read_coordinates(tmp_path / "out/coords/s.h5").coords) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "CLAM"}, "style 'CLAM': expected trident or clam"),
        ({"clean": ("ink",)}, "no step 'ink'; known are pen, "),
        ({"whole_slide": True, "masks": "masks"}, "whole_slide: excludes masks"),
        ({"whole_slide": True, "clean": ("pen",)}, "whole_slide: excludes masks and clean"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TileSettings(PatchSpec(64, 0.5), **changes)  # type: ignore[arg-type]

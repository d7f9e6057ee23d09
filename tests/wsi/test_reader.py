"""Reading compared with OpenSlide, pixel by pixel, and damaged files of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.wsi.real_data import real_file
from tests.wsi.slides import spoil_tile, tissue_pixels, write_svs, write_tiff
from wsi import tiff_tiles
from wsi.reader import Region, ResolutionError, Slide, SlideError
from wsi.tiff_tiles import TiffTiles

WIDTH, HEIGHT = 1300, 900


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    pixels = tissue_pixels(WIDTH, HEIGHT)
    return {
        "svs": write_svs(folder / "420.svs", pixels),
        "svs_444": write_svs(folder / "444.svs", pixels, subsampling=(1, 1), tile=240),
        "tiff": write_tiff(folder / "generic.tif", pixels),
    }


def by_openslide(path: Path, region: Region) -> np.ndarray:
    """A region of level 0 by OpenSlide alone, over white."""
    with openslide.OpenSlide(path) as slide:
        side = region.size_level0
        rgba = slide.read_region((region.x_level0, region.y_level0), 0, (side, side))
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


@pytest.mark.parametrize("kind", ["svs", "svs_444", "tiff"])
@settings(max_examples=25, deadline=None)
@given(x=st.integers(-400, WIDTH + 50), y=st.integers(-400, HEIGHT + 50), side=st.integers(1, 700))
def test_any_region_has_openslides_pixels(
    slides: dict[str, Path], kind: str, x: int, y: int, side: int
) -> None:
    region = Region(x, y, side, side)
    with Slide(slides[kind]) as slide:
        found = slide.read(region)
        assert slide._tiles is not None
        assert all(slide._proven.values())
    assert np.array_equal(found, by_openslide(slides[kind], region))


@pytest.mark.parametrize("size_level0,size_px", [(512, 256), (600, 224), (1024, 256), (100, 150)])
def test_scaled_regions_are_the_same_with_and_without_tiles(
    slides: dict[str, Path], size_level0: int, size_px: int
) -> None:
    regions = [Region(x, y, size_level0, size_px) for y in (0, 8, 256) for x in (-4, 0, 17, 512)]
    with Slide(slides["svs"]) as fast, Slide(slides["svs"], decode_tiles=False) as plain:
        results = list(zip(fast.read_many(regions), plain.read_many(regions), strict=True))
    assert all(np.array_equal(ours, theirs) for ours, theirs in results)
    assert {ours.shape for ours, _ in results} == {(size_px, size_px, 3)}


def test_scaling_is_pillows_bicubic(slides: dict[str, Path]) -> None:
    with Slide(slides["tiff"]) as slide:
        whole = slide.read(Region(100, 50, 512, 512))
        half = slide.read(Region(100, 50, 512, 256))
    expected = Image.fromarray(whole).resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(half, np.asarray(expected))


def test_a_coarser_level_is_used_where_it_is_fine_enough(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Slide(slides["svs"]) as slide:
        assert list(slide.level_downsamples) == [1.0, 4.0]
        levels = []
        read_boxes = TiffTiles.read_boxes

        def spy(self: TiffTiles, level: Any, boxes: Any) -> Any:
            levels.append((level.width, [box[2] for box in boxes]))
            return read_boxes(self, level, boxes)

        monkeypatch.setattr(TiffTiles, "read_boxes", spy)
        list(slide.read_many([Region(0, 0, 512, 256), Region(0, 0, 512, 128)]))
    assert levels == [(WIDTH, [512]), (WIDTH // 4, [128])]


def test_each_tile_is_decoded_once(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Slide(slides["svs"]) as slide:
        slide.read(Region(0, 0, 10, 10))  # the proof decodes tiles of its own
        decoded = []
        decode = TiffTiles.decode
        monkeypatch.setattr(
            TiffTiles,
            "decode",
            lambda self, level, number: decoded.append(number) or decode(self, level, number),
        )
        regions = [Region(x, y, 300, 300) for y in range(0, 600, 100) for x in range(0, 900, 150)]
        list(slide.read_many(regions))
    assert len(decoded) == len(set(decoded)) == 5 * 4


def test_little_memory_gives_the_same_pixels(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = [Region(x, y, 300, 300) for y in range(0, 600, 100) for x in range(0, 900, 150)]
    with Slide(slides["svs"]) as slide:
        expected = list(slide.read_many(regions))
        monkeypatch.setattr(tiff_tiles, "_CACHE_BYTES", 3 * 256 * 256 * 2)
        found = list(slide.read_many(regions))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tiles_that_differ_from_openslide_are_not_used(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = TiffTiles.decode

    def wrong(self: TiffTiles, level: Any, number: int) -> np.ndarray:
        tile = decode(self, level, number).copy()
        tile[3, 5, 1] ^= 1
        return tile

    monkeypatch.setattr(TiffTiles, "decode", wrong)
    region = Region(30, 40, 500, 500)
    with Slide(slides["svs"]) as slide:
        found = slide.read(region)
        assert slide._proven == {0: False}
    assert np.array_equal(found, by_openslide(slides["svs"], region))


@pytest.mark.parametrize("decode_tiles", [True, False])
def test_a_corrupt_tile_spoils_only_its_own_regions(tmp_path: Path, decode_tiles: bool) -> None:
    path = write_svs(tmp_path / "s.svs", tissue_pixels(WIDTH, HEIGHT))
    good = by_openslide(path, Region(600, 500, 200, 200))
    spoil_tile(path, 0)
    bad_region, good_region = Region(10, 10, 100, 100), Region(600, 500, 200, 200)
    with Slide(path, decode_tiles=decode_tiles) as slide:
        results = list(slide.read_many([bad_region, good_region, bad_region, good_region]))
        with pytest.raises(SlideError, match=r"s\.svs"):
            slide.read(bad_region)
        assert np.array_equal(slide.read(good_region), good)
    assert [isinstance(result, SlideError) for result in results] == [True, False, True, False]


def test_broken_files_are_told_apart(tmp_path: Path) -> None:
    whole = write_svs(tmp_path / "whole.svs", tissue_pixels(WIDTH, HEIGHT))
    content = whole.read_bytes()
    (tmp_path / "empty.svs").touch()
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "text.svs").write_text("<html>503 Service Unavailable</html>\n")
    (tmp_path / "pointer.tif").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "head.svs").write_bytes(content[:6])
    (tmp_path / "noise.svs").write_bytes(np.random.default_rng(0).bytes(5000))
    expected = {
        "missing.svs": "no such file",
        "empty.svs": "the file is empty",
        "folder.svs": "is a folder",
        "text.svs": "holds text, not an image: '<html>503",
        "pointer.tif": "holds text, not an image: 'version https://git-lfs",
        "head.svs": "directory cannot be read",
        "noise.svs": "OpenSlide cannot open it",
        "nul\0.svs": "no file can have this name",
        "missing.png": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(SlideError) as error:
            Slide(tmp_path / name)
        assert message in str(error.value), name


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_slide_says_so_when_opened_or_read(tmp_path: Path, share: float) -> None:
    content = write_svs(tmp_path / "whole.svs", tissue_pixels(WIDTH, HEIGHT)).read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SlideError, match="truncated"):
        slide = Slide(path)
        for level, (width, height) in enumerate(slide.level_dimensions):
            scale = round(slide.level_downsamples[level])
            for y in range(0, height, 100):
                slide.read(Region(0, y * scale, width * scale, width))


def test_resolution_of_the_file_and_of_the_user(tmp_path: Path) -> None:
    pixels = tissue_pixels(300, 300)
    write_svs(tmp_path / "known.svs", pixels, mpp=0.2505, magnification=40)
    write_svs(tmp_path / "magnified.svs", pixels, mpp=None, magnification=20)
    write_tiff(tmp_path / "printed.tif", pixels, resolution=(72, 72), resolutionunit="INCH")
    write_tiff(
        tmp_path / "micro.tif", pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    known = Slide(tmp_path / "known.svs")
    assert (known.mpp, known.magnification) == (0.2505, 40)
    assert Slide(tmp_path / "micro.tif").mpp == 0.5
    for name, hint in (
        ("magnified.svs", "20x, suggests about 0.5"),
        ("printed.tif", "--slide-mpp"),
    ):
        slide = Slide(tmp_path / name)
        assert slide.known_mpp is None
        with pytest.raises(ResolutionError, match=hint):
            _ = slide.mpp
        assert Slide(tmp_path / name, mpp=0.3, magnification=30).mpp == 0.3
    assert Slide(tmp_path / "known.svs", mpp=0.3).mpp == 0.3
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mpp: expected a positive number"):
            Slide(tmp_path / "known.svs", mpp=wrong)


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    pixels = tissue_pixels(300, 300)
    for name, y, square in (("near", 20100, True), ("far", 10000, False)):
        path = write_tiff(
            tmp_path / f"{name}.tif", pixels, resolution=(20000, y), resolutionunit="CENTIMETER"
        )
        with Slide(path) as slide:
            if square:
                assert slide.mpp == pytest.approx(0.49876, abs=1e-4)
                continue
            with pytest.raises(ResolutionError, match=r"not square: 0\.5 x 1 micrometres"):
                _ = slide.mpp
        assert Slide(path, mpp=0.5).mpp == 0.5


def test_plain_images_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[:, :30] = (200, 10, 20, 255)
    rgba[:, 30:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "untiled.tif")
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(tmp_path / "deep.png")
    with Slide(tmp_path / "rgba.png") as slide:
        pixels = slide.read(Region(20, 30, 20, 20))
    assert (pixels[:10, :10] == (200, 10, 20)).all()
    assert (pixels[:, 10:] == 255).all() and (pixels[10:] == 255).all()
    assert Slide(tmp_path / "grey.jpg").dimensions == (60, 40)
    assert Slide(tmp_path / "untiled.tif").dimensions == (60, 40)
    with pytest.raises(SlideError, match="8-bit"):
        Slide(tmp_path / "deep.png")


def test_thumbnail_in_bands_is_the_whole_slide(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Slide(slides["tiff"]) as slide:
        whole = np.asarray(slide.thumbnail(325), float)
        monkeypatch.setattr("wsi.reader._BAND_PX", WIDTH * HEIGHT // 7)
        banded = np.asarray(slide.thumbnail(325), float)
        assert slide.thumbnail(5000).size == (WIDTH, HEIGHT)
    assert whole.shape == (225, 325, 3)
    assert np.abs(whole - banded).max() <= 1


def test_where_a_region_lies(slides: dict[str, Path]) -> None:
    with Slide(slides["tiff"]) as slide:
        places = {
            "inside": [(0, 0), (WIDTH - 10, HEIGHT - 10)],
            "partial": [(-1, 0), (0, -9), (WIDTH - 9, 0), (WIDTH - 1, HEIGHT - 1)],
            "outside": [(-10, 0), (0, -10), (WIDTH, 0), (0, HEIGHT), (2**40, 0), (-(2**40), 5)],
        }
        for place, corners in places.items():
            for x, y in corners:
                assert slide.overlap(Region(x, y, 10, 10)) == place
        assert (slide.read(Region(2**40, 0, 10, 10)) == 255).all()
    for size in (0, -1, 70_000):
        with pytest.raises(ValueError, match="size_level0"):
            Region(0, 0, size, 10)


def test_a_real_aperio_slide() -> None:
    path = real_file("slides/small_HE.svs")
    with Slide(path) as slide:
        assert slide.dimensions == (2220, 2967)
        assert (slide.mpp, slide.magnification) == (0.499, 20)
        regions = [Region(x, y, 672, 672) for y in (-100, 0, 1111, 2900) for x in (0, 777, 2000)]
        found = list(slide.read_many(regions))
        assert slide._proven == {0: True}
        thumbnail = slide.thumbnail(500)
    assert thumbnail.size == (374, 500)
    for region, pixels in zip(regions, found, strict=True):
        assert np.array_equal(pixels, by_openslide(path, region))

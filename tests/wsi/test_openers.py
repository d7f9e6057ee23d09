"""TIFF files that OpenSlide does not open or knows only in part, written by tifffile and Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.wsi.slides import tissue_pixels
from wsi.openers import OpenSlideBackend, PlainImageBackend, TiffBackend
from wsi.reader import Region, ResolutionError, Slide, SlideError

PIXELS = tissue_pixels(700, 500)
HALF_MICRON: dict[str, Any] = dict(resolution=(20000, 20000), resolutionunit="CENTIMETER")


def write(path: Path, pixels: Any, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"metadata": None, **options})
    return path


@pytest.mark.parametrize("kind", ["strips", "deep", "planar", "big_endian", "lzw", "grey", "white",
                                  "rgba", "zstd", "jpeg2000", "jpegxl"])  # fmt: skip
def test_pixels_and_resolution_of_other_tiffs(tmp_path: Path, kind: str) -> None:
    grey = PIXELS[..., 0].copy()
    opaque = np.full((*PIXELS.shape[:2], 1), 255, np.uint8)
    rgb: dict[str, Any] = dict(photometric="rgb", rowsperstrip=16)
    pixels, options = {
        "strips": (PIXELS, rgb),
        "deep": (PIXELS.astype(np.uint16) * 257, rgb),
        "planar": (PIXELS.transpose(2, 0, 1).copy(), {**rgb, "planarconfig": "separate"}),
        "big_endian": (PIXELS, {"photometric": "rgb", "tile": (128, 128), "byteorder": ">"}),
        "lzw": (PIXELS, {**rgb, "compression": "lzw"}),
        "grey": (grey, {"photometric": "minisblack"}),
        "white": (255 - grey, {"photometric": "miniswhite"}),
        "rgba": (np.dstack([PIXELS, opaque]), {**rgb, "extrasamples": ["unassalpha"]}),
        "zstd": (PIXELS, {**rgb, "compression": "zstd"}),
        "jpeg2000": (PIXELS, {"photometric": "rgb", "tile": (128, 128), "compression": "jpeg2000"}),
        "jpegxl": (PIXELS, {"photometric": "rgb", "tile": (128, 128), "compression": "jpegxl"}),
    }[kind]
    path = write(tmp_path / "s.tif", pixels, **options, **HALF_MICRON)
    expected = grey[..., None].repeat(3, 2) if kind in ("grey", "white") else PIXELS
    with Slide(path) as slide:
        assert (slide.dimensions, slide.mpp) == ((700, 500), pytest.approx(0.5))
        found = slide.read(Region(130, 90, 256, 256))
        edge = slide.read(Region(600, 400, 200, 200))
    assert np.array_equal(found, expected[90:346, 130:386])
    assert np.array_equal(edge[:100, :100], expected[400:, 600:])
    assert (edge[100:] == 255).all() and (edge[:, 100:] == 255).all()


def test_little_memory_gives_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "s.tif", PIXELS, photometric="rgb", rowsperstrip=7)
    monkeypatch.setattr("wsi.openers._SEGMENT_CACHE_BYTES", 50_000)
    with Slide(path) as slide:
        assert np.array_equal(slide.read(Region(0, 0, 500, 500)), PIXELS[:500, :500])
        assert isinstance(slide._backend, TiffBackend)
        assert slide._backend._segment_bytes <= 50_000
    monkeypatch.setattr("wsi.openers._MAX_SEGMENT_PX", 3000)
    with pytest.raises(SlideError, match=r"too large for a plain image.* a tiled TIFF"):
        Slide(path)


@pytest.mark.parametrize("channels", [3, 1])
def test_both_kinds_of_alpha_are_drawn_over_white_once(tmp_path: Path, channels: int) -> None:
    colours = PIXELS[..., :channels]
    alpha = np.linspace(0, 255, colours.shape[1], dtype=np.uint8)[None, :, None]
    alpha = np.broadcast_to(alpha, (*colours.shape[:2], 1))
    expected = colours * (alpha / 255) + (255 - alpha)
    options: dict[str, Any] = {"rowsperstrip": 16, "planarconfig": "contig"}
    options["photometric"] = "rgb" if channels == 3 else "minisblack"
    for kind, stored in (("unassalpha", colours), ("assocalpha", colours * (alpha / 255))):
        pixels = np.dstack([np.rint(stored).astype(np.uint8), alpha])
        path = write(tmp_path / f"{kind}.tif", pixels, extrasamples=[kind], **options)
        with Slide(path, mpp=0.5) as slide:
            found = slide.read(Region(0, 0, 500, 500))
        assert np.abs(found - expected[:, :500]).max() <= 1


def write_ome(path: Path, *, unit: str = "µm", size: float = 0.25) -> Path:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = dict(photometric="rgb", tile=(128, 128), compression="jpeg")
        sizes = {"PhysicalSizeX": size, "PhysicalSizeY": size}
        units = {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
        tiff.write(PIXELS, subifds=1, metadata={"axes": "YXS", **sizes, **units}, **options)
        tiff.write(PIXELS[::2, ::2], subfiletype=1, **options)
    return path


def test_levels_and_resolution_of_ome_tiff(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "s.ome.tif")
    with Slide(path) as slide:
        assert list(slide.level_dimensions) == [(700, 500), (350, 250)]
        assert slide.mpp == 0.25
        patch, half = (slide.read(Region(128, 64, 256, px)) for px in (256, 128))
    level0 = OpenSlideBackend(path)  # which sees this level alone
    assert np.array_equal(patch, level0.read(128, 64, 0, 256, 256))
    assert np.abs(half.astype(int) - PIXELS[64:320:2, 128:384:2]).mean() < 8
    assert Slide(write_ome(tmp_path / "n.ome.tif", unit="nm", size=250)).mpp == 0.25
    no_length = Slide(write_ome(tmp_path / "p.ome.tif", unit="pixel"))
    with pytest.raises(ResolutionError):
        _ = no_length.mpp


@pytest.mark.parametrize("dots", [72, 25400])
def test_the_ome_xml_outweighs_the_resolution_tags(tmp_path: Path, dots: int) -> None:
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, PIXELS, ome=True, photometric="rgb", tile=(128, 128),
                     metadata={"axes": "YXS", **sizes}, resolution=(dots, dots),
                     resolutionunit="INCH")  # fmt: skip
    with Slide(path) as slide:
        assert slide.known_mpp == 0.25
    assert OpenSlideBackend(path).mpp != 0.25


def test_levels_of_a_pyramid_in_strips(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2, 4):
            tiff.write(PIXELS[::step, ::step], photometric="rgb", rowsperstrip=20, metadata=None,
                       subfiletype=int(step > 1), **HALF_MICRON)  # fmt: skip
    with Slide(path) as slide:
        assert list(slide.level_dimensions) == [(700, 500), (350, 250), (175, 125)]
        found = slide.read(Region(200, 100, 256, 64))
    assert np.array_equal(found, PIXELS[100:356:4, 200:456:4])


@pytest.mark.parametrize("thumbnail", [{"rowsperstrip": 16}, {"tile": (64, 64)}])
def test_the_slide_is_the_largest_image_not_the_first(
    tmp_path: Path, thumbnail: dict[str, Any]
) -> None:
    path, slide_px = tmp_path / "s.tif", tissue_pixels(800, 600)
    options: dict[str, Any] = dict(photometric="rgb", metadata=None)
    tiled: dict[str, Any] = dict(tile=(128, 128), **options, **HALF_MICRON)

    def write_images(dtype: Any) -> None:
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(slide_px[::8, ::8], **thumbnail, **options)
            tiff.write(slide_px.astype(dtype), **tiled)
            tiff.write(slide_px[::2, ::2], subfiletype=1, **tiled)
            tiff.write(tissue_pixels(900, 700), description="Macro image", **options)
            tiff.write(tissue_pixels(910, 700), subfiletype=1, **options)

    write_images(np.uint8)
    with Slide(path) as slide:
        assert list(slide.level_dimensions) == [(800, 600), (400, 300)]
        assert slide.mpp == pytest.approx(0.5)
        assert np.array_equal(slide.read(Region(130, 90, 256, 256)), slide_px[90:346, 130:386])
    write_images(np.float32)
    with pytest.raises(SlideError, match="image 1, the largest: pixels of the kind 32-bit RGB"):
        Slide(path)


@pytest.mark.parametrize("kind", ["ome_3", "ome_2_tiled", "imagej", "samples"])
def test_fluorescence_is_refused(tmp_path: Path, kind: str) -> None:
    planes = PIXELS.transpose(2, 0, 1).copy()
    path = tmp_path / ("s.ome.tif" if kind.startswith("ome") else "s.tif")
    tiled: dict[str, Any] = dict(photometric="minisblack", tile=(128, 128))
    if kind == "ome_3":
        tifffile.imwrite(path, planes, photometric="minisblack", metadata={"axes": "CYX"})
    elif kind == "ome_2_tiled":
        tifffile.imwrite(path, planes[:2], **tiled, metadata={"axes": "CYX"})
    elif kind == "imagej":
        tifffile.imwrite(path, planes[:2], imagej=True, metadata={"axes": "CYX"})
    else:
        write(path, PIXELS, planarconfig="contig", **tiled)
    with pytest.raises(SlideError, match=r"[23] channels that are not red, green and blue"):
        Slide(path)


def test_the_reason_of_every_library_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "deep.tif", PIXELS[..., 0].astype(np.uint16), photometric="minisblack")
    with pytest.raises(SlideError) as raised:
        Slide(tmp_path / "deep.tif")
    for reason in ("OpenSlide cannot open it", "16-bit MINISBLACK", "8-bit grey or colour"):
        assert reason in str(raised.value)
    whole = write(tmp_path / "c.tif", PIXELS, photometric="rgb", rowsperstrip=16, compression="lzw")
    with tifffile.TiffFile(whole) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, size = page.dataoffsets[3], page.databytecounts[3]
    with whole.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    with Slide(whole) as slide:
        with pytest.raises(SlideError, match="tile or strip 3 of level 0 is corrupt"):
            slide.read(Region(0, 40, 100, 100))
        assert np.array_equal(slide.read(Region(0, 100, 100, 100)), PIXELS[100:200, :100])


def test_pictures_that_only_pillow_reads(tmp_path: Path) -> None:
    for mode in ("P", "CMYK", "1"):
        Image.fromarray(PIXELS).convert(mode).save(tmp_path / f"{mode}.tif")
        slide = Slide(tmp_path / f"{mode}.tif")
        assert slide.dimensions == (700, 500)
        assert isinstance(slide._backend, PlainImageBackend)

"""Which files in a folder count as slides, for every command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.wsi.dicom import write_series
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.extraction import OutputSettings, extract
from wsi.reader import Region, Slide
from wsi.requests import PatchRequest
from wsi.slide_listing import AmbiguousSlideError, SlideListing, SlideNotFoundError
from wsi.tile_job import TileSettings, tile_slides
from wsi.tiling import PatchSpec


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def reasons(listing: SlideListing) -> dict[str, str]:
    return {
        found.path.relative_to(listing.folder).as_posix(): found.reason
        for found in listing.passed_over
    }


def test_a_dicom_series_is_one_slide_with_all_levels(tmp_path: Path) -> None:
    pixels = tissue_pixels(1100, 900)
    uid = write_series(tmp_path / "s" / "one", pixels, downsamples=(1, 2, 4))
    single = write_series(tmp_path / "s" / "two", pixels[:600, :500], downsamples=(1,))
    touch(tmp_path, "s/two/broken.dcm")
    listing = SlideListing(tmp_path / "s")
    (alone,) = (p for p in (tmp_path / "s" / "two").glob("*.dcm") if p.stem != "broken")
    assert set(listing.slides) == {uid, alone.stem, "broken"}
    assert single != alone.stem
    for path in (tmp_path / "s" / "one").iterdir():  # found by any of its files
        assert listing.find(path.stem) == listing.find(uid)
    with Slide(listing.find(uid)) as slide:
        assert slide.level_dimensions == ((1100, 900), (550, 450), (275, 225))
        assert slide.mpp == 0.5
        difference = slide.read(Region(100, 50, 256, 256)).astype(int) - pixels[50:306, 100:356]
    assert np.abs(difference).mean() < 6
    report = tile_slides(
        tmp_path / "s", tmp_path / "out", TileSettings(PatchSpec(128, 0.5)), progress=False
    )
    assert (report.written, report.reasons) == (2, {"slide unreadable": 1})
    assert (tmp_path / "out" / "coords" / f"{uid}.h5").is_file()


def test_a_series_in_two_folders_is_ambiguous(tmp_path: Path) -> None:
    uid = write_series(tmp_path / "one", tissue_pixels(300, 300))
    (tmp_path / "two").mkdir()
    for path in (tmp_path / "one").iterdir():
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    listing = SlideListing(tmp_path)
    assert list(listing.ambiguous) == [uid] and not listing.slides
    with pytest.raises(AmbiguousSlideError, match="2 slides have this name"):
        listing.find(uid)


def test_pictures_of_slides_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.png", "a_thumbnail.JPG", "masks/a.png", "a-mask.bmp", "b.jpg")
    touch(
        tmp_path,
        "ab.png",
        "thumb_a.png",
        "._a.svs",
        "._b.jpg",
        ".hidden.svs",
        ".Trash/c.svs",
        "notes.txt",
    )
    listing = SlideListing(tmp_path)
    assert set(listing.slides) == {"a", "ab", "b"}
    assert listing.find("a") == tmp_path / "a.svs"
    assert reasons(listing) == {
        "a.png": "picture of a slide",
        "a_thumbnail.JPG": "picture of a slide",
        "a-mask.bmp": "picture of a slide",
        "thumb_a.png": "picture of a slide",
        "masks/a.png": "picture of a slide",
        "._a.svs": "macOS metadata",
        "._b.jpg": "macOS metadata",
        ".hidden.svs": "hidden file",
        ".Trash": "hidden folder",
    }


def test_folders_of_tiles(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "tiles_of_a/00000x_00000y.png", "tiles_of_a/overview.png")
    touch(tmp_path, "deep/down/b/1x_-2y.jpeg", "00064x_00000y.png")
    with_tiles = SlideListing(tmp_path, tile_folders=True)
    assert with_tiles.slides == {
        "a": tmp_path / "a.svs",
        "tiles_of_a": tmp_path / "tiles_of_a",
        "b": tmp_path / "deep" / "down" / "b",
        tmp_path.name: tmp_path,
    }
    assert reasons(with_tiles) == {"tiles_of_a/overview.png": "picture in a folder of tiles"}
    without = SlideListing(tmp_path)
    assert set(without.slides) == {"a", "overview"}
    assert set(reasons(without).values()) == {"folder of tiles"}
    touch(tmp_path, "a/00000x_00000y.png")  # which of both is meant?
    assert list(SlideListing(tmp_path, tile_folders=True).ambiguous) == ["a"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/linked.svs", "slides/x.svs", "slides/sub/y.svs")
    slides = tmp_path / "slides"
    (slides / "link").symlink_to(tmp_path / "elsewhere")
    (slides / "again").symlink_to(slides / "sub")
    (slides / "sub" / "circle").symlink_to(slides)
    (slides / "x_again.svs").symlink_to(slides / "x.svs")
    (slides / "sub" / "x.svs").symlink_to(slides / "x.svs")  # the same file, not a second slide
    (slides / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    listing = SlideListing(slides)
    assert set(listing.slides) == {"x", "y", "linked", "x_again", "gone"}
    assert listing.find("y") == slides / "sub" / "y.svs"
    assert set(reasons(listing)) == {"again", "sub/circle"}
    guarded = SlideListing(slides, inside_only=True)
    assert "linked" not in guarded.slides
    assert reasons(guarded)["link"] == "link to a path outside the folder"


def test_part_files_of_multi_file_slides(tmp_path: Path) -> None:
    touch(tmp_path, "s.mrxs", "s/Data0000.dat", "s/Slidedat.ini", "s/preview.jpg")
    touch(tmp_path, "h(1,0).jpg", "h_macro.jpg", "h_map2.jpg", "h.jpg", "other.jpg")
    (tmp_path / "h.vms").write_text(
        "[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=h.jpg\r\nMapFile=h_map2.jpg\r\n"
        "ImageFile(1,0)=h(1,0).jpg\r\nMacroImage=h_macro.jpg\r\n"
    )
    listing = SlideListing(tmp_path)
    assert set(listing.slides) == {"s", "h", "other"}
    assert listing.find("h") == tmp_path / "h.vms"
    assert set(reasons(listing).values()) == {"part of a slide"} and len(reasons(listing)) == 4


def test_the_output_of_jobs_is_no_input(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for number in range(2):
        write_svs(slides / f"s{number}.svs", tissue_pixels(400, 400, seed=number))
    (slides / "masks").mkdir()
    for number in range(2):
        Image.new("L", (40, 40), 255).save(slides / "masks" / f"s{number}.png")
    settings = TileSettings(PatchSpec(64, 0.5), masks=str(slides / "masks"))
    for name in ("out1", "out2", "out1"):  # inside the folder of the slides, and begun again
        report = tile_slides(slides, slides / name, settings, progress=False)
        assert (report.written, report.skipped, report.exit_code) == (2, 0, 0)
    assert report.passed_over == {"output of a job": 1}
    rows = [json.loads(line) for line in (slides / "out2" / "passed_over.jsonl").open()]
    assert {os.path.basename(row["file"]) for row in rows} == {"out1"}
    requests = [PatchRequest(1, "s0", 0, 0, 64, 64)]
    for _ in range(2):
        found = extract(
            lambda: iter(requests), slides, slides / "patches", settings=OutputSettings(),
            source={}, progress=False,
        )  # fmt: skip
        assert (found.written, found.skipped) == (1, 0)


def test_one_slide_and_none(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.png")
    assert SlideListing(tmp_path / "a.png").slides == {"a": tmp_path / "a.png"}
    with pytest.raises(SlideNotFoundError, match=r"no slide of this name under .*'b'"):
        SlideListing(tmp_path).find("b")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        SlideListing(tmp_path / "none")


def test_tables_of_trident_and_slide2vec(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.svs", "deep/b.tif", "deep/c.tif"):
        (tmp_path / name).touch()
    elsewhere = tmp_path / "deep/c.tif"
    tables = {
        "trident": "wsi,mpp\na.svs,0.25\ndeep/b.tif,\n",
        "slide2vec": "sample_id,image_path,mask_path,spacing_at_level_0,patient_id\n"
        f"a,a.svs,m/a.png,0.25,p\nb,deep/b.tif,,,p\nx.1,{elsewhere},/m/x.geojson,0.5,q\n",
        "own": "\ufeffslide_id,path,mpp,mask,label,split\na,a.svs,0.25,,tumour,train\n",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    trident, other, own = (SlideListing(tmp_path / f"{name}.csv") for name in tables)
    assert trident.slides == {"a": tmp_path / "a.svs", "b": tmp_path / "deep/b.tif"}
    assert (trident.mpp, trident.masks) == ({"a": 0.25}, {})
    assert other.find("x.1") == elsewhere and list(other.slides) == ["a", "b", "x.1"]
    assert other.masks == {"a": tmp_path / "m/a.png", "x.1": Path("/m/x.geojson")}
    assert other.mpp == {"a": 0.25, "x.1": 0.5}
    assert own.slides == {"a": tmp_path / "a.svs"}


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    for text, message in (
        ("slide,mpp\na.svs,1\n", r"slides\.csv:2: expected a path in one of path, image_path, wsi"),
        ("wsi,mpp\na.svs,quarter\n", r"slides\.csv:2: mpp: .* found 'quarter'"),
        ("wsi,mpp\na.svs,0.5\nb.svs,-1\n", r"slides\.csv:3: mpp"),
        ("wsi,mpp\na.svs,0.5\na.svs,0.25\n", r"csv:3: mpp of a: 0\.25, but 0\.5 in line 2; remove"),
        (
            "wsi,mask\na.svs,\na.svs,m.png\na.svs,n.png\n",
            r"csv:4: mask of a: n\.png, but .* line 3",
        ),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            SlideListing(table)
    table.write_text("path,mpp\nx/a.svs,0.5\ny/a.svs,0.25\nb.svs,0.5\nb.svs,0.50\n")
    listing = SlideListing(table)
    assert list(listing.slides) == ["b"] and "2 slides have this name" in listing.ambiguous["a"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        SlideListing(tmp_path / "absent.csv")

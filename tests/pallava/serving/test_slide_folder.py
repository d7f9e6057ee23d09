"""Slides are found in the listing only, and regions are the requested pixels."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pallava.serving.slide_folder import SlideFolder
from pallava.serving.slides import SlideInfo, square_around
from tests.xtuner_add.served_model import MPP, make_slides


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> SlideFolder:
    return SlideFolder(make_slides(tmp_path_factory.mktemp("slides") / "here"))


def test_the_listing_holds_slides_of_the_folder_alone(slides: SlideFolder) -> None:
    assert slides.names() == ["photo.png", "tissue.tiff"]


def test_size_and_resolution_are_read(slides: SlideFolder) -> None:
    info = slides.info("tissue.tiff")
    assert (info.width_px, info.height_px) == (2048, 1024)
    assert info.mpp == pytest.approx(MPP)
    assert slides.info("photo.png") == SlideInfo("photo.png", 400, 600, None)


def test_a_thumbnail_is_the_whole_slide(slides: SlideFolder) -> None:
    assert slides.thumbnail("tissue.tiff", 256).size == (256, 128)
    assert slides.thumbnail("photo.png", 256).size == (171, 256)


def test_a_slide_of_one_level_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 6000
    tile = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(
        tmp_path / "flat.tiff", (tile for _ in range(12 * 12)), shape=(side, side, 3),
        dtype=np.uint8, tile=(512, 512), compression="jpeg", photometric="rgb",
    )  # fmt: skip
    monkeypatch.setattr("wsi.reader._BAND_PX", 1 << 20)
    slides = SlideFolder(tmp_path)
    tracemalloc.start()
    try:
        found = slides.thumbnail("flat.tiff", 500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.size == (500, 500)
    assert abs(int(np.asarray(found).mean()) - 200) < 3
    assert peak < side * side * 3 / 4
    # Every click on the slide needs the picture again; it is read once.
    monkeypatch.setattr("wsi.reader.Slide.overview", None)
    assert slides.thumbnail("flat.tiff", 500).tobytes() == found.tobytes()
    with pytest.raises(ValueError, match="choose a smaller region"):
        SlideFolder(make_flat(tmp_path / "large")).region("large.tiff", 0, 0, 9000, 2048)


def make_flat(folder: Path, side: int = 9000) -> Path:
    folder.mkdir()
    tile = np.full((1024, 1024, 3), 200, np.uint8)
    count = -(-side // 1024)
    tifffile.imwrite(
        folder / "large.tiff", (tile for _ in range(count * count)), shape=(side, side, 3),
        dtype=np.uint8, tile=(1024, 1024), compression="jpeg", photometric="rgb",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["tissue.tiff", "photo.png"])
@pytest.mark.parametrize(("side", "longest"), [(200, 300), (320, 40)])
def test_a_region_is_where_it_was_asked_for(
    slides: SlideFolder, name: str, side: int, longest: int
) -> None:
    found = np.asarray(slides.region(name, 64, 128, side, longest)).astype(int)
    assert found.shape == (min(side, longest), min(side, longest), 3)
    centre = found[len(found) // 2, len(found) // 2]
    x, y = 64 + side // 2, 128 + side // 2
    assert np.abs(centre - [x // 8, y // 4, 255 - x // 8]).max() <= 3
    left, right = found[:, 0, 0].mean(), found[:, -1, 0].mean()
    assert right - left == pytest.approx(side / 8, abs=4)


def test_outside_the_slide_is_glass(slides: SlideFolder) -> None:
    found = np.asarray(slides.region("photo.png", 300, 500, 200, 200))
    assert (found[150:, 150:] == 255).all()
    assert not (found[:90, :90] == 255).all()


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "link.png", "notes.txt", "/etc/passwd", "", ".", "TISSUE.tiff", "a\0"],
)
def test_other_names_are_not_found(slides: SlideFolder, name: str) -> None:
    for read in (slides.info, lambda name: slides.region(name, 0, 0, 10, 10)):
        with pytest.raises(FileNotFoundError, match="not in the listing"):
            read(name)


def test_a_file_that_is_no_slide_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide at all")
    (tmp_path / "broken.tif").write_bytes(b"no slide at all")
    for name in ("broken.svs", "broken.tif"):
        with pytest.raises(ValueError, match=name):
            SlideFolder(tmp_path).info(name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SlideFolder(tmp_path / "none")


def test_a_region_that_would_fill_the_memory_is_refused(slides: SlideFolder) -> None:
    with pytest.raises(ValueError, match="choose a smaller region"):
        slides.region("photo.png", 0, 0, 100_000, 100)


def test_subfolders_count_and_pictures_of_slides_do_not(tmp_path: Path) -> None:
    make_slides(tmp_path / "here" / "deep")
    (tmp_path / "here" / "deep" / "link.png").unlink()
    (tmp_path / "here" / "outside.png").unlink()
    (tmp_path / "here" / "deep" / "tissue.png").write_bytes(
        (tmp_path / "here" / "deep" / "photo.png").read_bytes()
    )
    folder = SlideFolder(tmp_path / "here")
    assert folder.names() == ["deep/photo.png", "deep/tissue.tiff"]
    assert folder.info("deep/tissue.tiff").width_px == 2048
    (tmp_path / "here" / "deep" / "photo.png").rename(tmp_path / "here" / "new.png")
    assert folder.info("new.png").width_px == 400  # found although it came after the listing


def test_only_a_few_slides_stay_open(tmp_path: Path) -> None:
    for number in range(7):
        Image.new("RGB", (30 + number, 20)).save(tmp_path / f"{number}.png")
    folder = SlideFolder(tmp_path)
    for _ in range(2):
        widths = [folder.info(name).width_px for name in folder.names()]
        assert widths == list(range(30, 37))
    assert len(folder._open) == 4


def test_a_region_in_pieces_is_the_region(
    slides: SlideFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.asarray(slides.region("tissue.tiff", -100, 30, 1200, 300)).astype(int)
    monkeypatch.setattr("pallava.serving.slide_folder.MAX_SIDE_PX", 500)
    pieces = np.asarray(slides.region("tissue.tiff", -100, 30, 1200, 300)).astype(int)
    assert pieces.shape == whole.shape == (300, 300, 3)
    assert np.abs(pieces - whole).mean() < 2


@pytest.mark.parametrize(
    ("mpp", "centre", "size", "expected"),
    [
        (0.5, (0.5, 0.5), 100, (900, 400, 200)),
        (None, (0.5, 0.5), 100, (950, 450, 100)),
        (None, (0.0, 1.0), 100, (0, 900, 100)),
        (None, (0.5, 0.5), 5000, (0, 0, 5000)),
        (0.25, (0.5, 0.5), 0.01, (1000, 500, 1)),
    ],
)
def test_squares_stay_inside_the_slide(
    mpp: float | None, centre: tuple[float, float], size: float, expected: tuple[int, int, int]
) -> None:
    assert square_around(SlideInfo("a", 2000, 1000, mpp), centre, size) == expected


NAN = float("nan")


@pytest.mark.parametrize(
    ("centre", "size"),
    [((0.5, 0.5), 0), ((0.5, 0.5), NAN), ((2.0, 0.5), 9), ((0.5, NAN), 9)],
)
def test_what_is_no_region_is_refused(centre: tuple[float, float], size: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        square_around(SlideInfo("a", 2000, 1000, 0.5), centre, size)

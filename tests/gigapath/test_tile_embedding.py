"""Embeddings of a slide's tiles are correct and resumable, and files are complete or absent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gigapath.embed.tile_inference import TileEncoder
from gigapath.tile_encoder import tile_transform
from tests.gigapath.tiny_encoders import tiny_model
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.features import (
    EmbeddingError,
    FolderTiles,
    Resize,
    SlideTiles,
    Tiles,
    check_features,
    embed_tiles,
    read_ahead,
    read_tiles,
)
from wsi.reader import Region, Slide, SlideError
from wsi.store import read_attributes, read_features


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.svs"
    return write_svs(path, tissue_pixels(700, 500), mpp=0.25)


def tiles_of(slide: Path, number: int = 30) -> SlideTiles:
    places = [(x, y) for y in range(0, 440, 64) for x in range(0, 640, 64)]
    return SlideTiles(slide, np.array(places[:number], np.int64), 64, 37)


class CountingEncoder(TileEncoder):
    """Counts tiles, and stops after some."""

    seen = 0
    stop_after: int | None = None

    def encode(self, pixels: Any) -> Tensor:
        self.seen += len(pixels)
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        return super().encode(pixels)


def encoder() -> CountingEncoder:
    return CountingEncoder(tiny_model())


def run(tiles: Tiles, out: Path, model: TileEncoder | None = None, **options: Any) -> Any:
    settings = dict(name="tiny", weights_sha256="abc", batch_size=4, part_tiles=8) | options
    model = model or encoder()
    return embed_tiles(tiles, model, out / "s.h5", out / "parts", **settings)


def test_embeddings_are_those_of_the_transformed_tiles(slide: Path, tmp_path: Path) -> None:
    tiles = tiles_of(slide)
    found = run(tiles, tmp_path, attributes={"patch_size_level0": 64})
    transform = tile_transform(32)
    with Slide(slide) as opened:
        images = [opened.read(Region(int(x), int(y), 64, 37)) for x, y in tiles.coords]
    expected = encoder().encode_normalised(
        torch.stack([transform(Image.fromarray(image)) for image in images])
    )
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-5)
    assert np.ptp(found.features, axis=0).min() > 0
    features, coords = read_features(tmp_path / "s.h5")
    assert np.array_equal(features, found.features) and features.dtype == np.float32
    assert np.array_equal(coords, tiles.coords)
    attributes = read_attributes(tmp_path / "s.h5")
    assert attributes["weights_sha256"] == "abc" and attributes["precision"] == "fp32"
    assert attributes["patch_size_level0"] == 64
    assert json.loads(attributes["transform"])["resize_px"] == 37
    assert not (tmp_path / "parts").exists()


@pytest.mark.multiproc
def test_processes_read_the_same(slide: Path, tmp_path: Path) -> None:
    tiles = tiles_of(slide)
    run(tiles, tmp_path / "thread")
    run(tiles, tmp_path / "processes", workers=2)
    files = [(tmp_path / name / "s.h5").read_bytes() for name in ("thread", "processes")]
    assert files[0] == files[1]


def test_a_stopped_run_continues(slide: Path, tmp_path: Path) -> None:
    tiles = tiles_of(slide)
    run(tiles, tmp_path / "whole")
    model = encoder()
    model.stop_after = 21
    with pytest.raises(KeyboardInterrupt):
        run(tiles, tmp_path / "out", model)
    assert not (tmp_path / "out" / "s.h5").exists()
    assert len(list((tmp_path / "out" / "parts").rglob("*.npz"))) == 2
    model = encoder()
    assert not run(tiles, tmp_path / "out", model).reused
    assert model.seen == 30 - 2 * 8
    whole = (tmp_path / "whole" / "s.h5").read_bytes()
    assert (tmp_path / "out" / "s.h5").read_bytes() == whole
    # A kill may fall between the last file and the removal of its parts.
    (tmp_path / "out" / "parts" / "left").mkdir(parents=True)
    again = run(tiles, tmp_path / "out", model := encoder())
    assert again.reused and model.seen == 0
    assert not (tmp_path / "out" / "parts").exists()
    assert np.array_equal(again.features, read_features(tmp_path / "out" / "s.h5")[0])


def test_parts_and_files_of_something_else_are_not_taken(slide: Path, tmp_path: Path) -> None:
    tiles = tiles_of(slide)
    run(tiles, tmp_path)
    for change in (dict(weights_sha256="other"), dict(batch_size=5), dict(part_tiles=12)):
        assert not run(tiles, tmp_path, **change).reused
    assert not run(tiles_of(slide, 20), tmp_path).reused
    whole = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "s.h5").write_bytes(whole[: len(whole) // 2])
    assert not run(tiles_of(slide, 20), tmp_path).reused
    assert (tmp_path / "s.h5").read_bytes() == whole
    low = CountingEncoder(tiny_model(), precision="bf16")
    assert not run(tiles_of(slide, 20), tmp_path, low).reused


def write_tiles(folder: Path, places: list[tuple[int, int]], side: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = tissue_pixels(400, 400)
    for x, y in places:
        tile = Image.fromarray(pixels[y : y + side, x : x + side])
        tile.save(folder / f"{x:05d}x_{y:05d}y.png")
    return folder


PLACES = [(40, 40), (0, 40), (80, 0), (0, 0)]


def test_a_folder_of_tiles(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "slide_7", PLACES)
    (folder / "dataset.csv").write_text("slide_id")
    (folder / "notes_1x.png").touch()
    tiles = FolderTiles.find(folder)
    assert (tiles.name, tiles.size_level0) == ("slide_7", 40)
    assert tiles.coords.tolist() == [[0, 0], [80, 0], [0, 40], [40, 40]]
    found = run(tiles, tmp_path / "out")
    transform = tile_transform(32)
    images = [Image.open(folder / name) for name in tiles.files]
    expected = encoder().encode_normalised(torch.stack([transform(i) for i in images]))
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-5)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderTiles.find(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no image named like"):
        FolderTiles.find(tmp_path)
    folder = write_tiles(tmp_path / "t", [(0, 0)])
    assert FolderTiles.find(folder).size_level0 == 40  # of the only image
    assert FolderTiles.find(folder, size_level0=80).size_level0 == 80
    (folder / "0x_0y.png").touch()
    with pytest.raises(ValueError, match=r"both 00000x_00000y\.png and 0x_0y\.png lie at \(0, 0\)"):
        FolderTiles.find(folder)
    with pytest.raises(ValueError, match="no images given"):
        FolderTiles.of_files([])
    with pytest.raises(ValueError, match=r"a\.png: expected a name like"):
        FolderTiles.of_files(["a.png"])


@given(st.sets(st.tuples(st.integers(0, 99999), st.integers(0, 99999)), min_size=1, max_size=9))
def test_names_give_places_back(places: set[tuple[int, int]]) -> None:
    files = [f"{x:05d}x_{y:05d}y.png" for x, y in sorted(places)]
    assert FolderTiles.of_files(files).coords.tolist() == [list(place) for place in sorted(places)]


def test_damaged_tiles_are_left_out(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "tiles", PLACES)
    broken = folder / "00080x_00000y.png"
    broken.write_bytes(broken.read_bytes()[:100])
    found = run(FolderTiles.find(folder), tmp_path / "out", batch_size=2, part_tiles=2)
    assert found.num_damaged == 1
    assert found.coords.tolist() == [[0, 0], [0, 40], [40, 40]]
    again = run(FolderTiles.find(folder), tmp_path / "out", batch_size=2, part_tiles=2)
    assert again.reused and again.num_damaged == 1
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SlideError, match=r"none of 4 tiles can be read; the last: .*00040x"):
        run(FolderTiles.find(folder), tmp_path / "none")


def test_what_cannot_be_embedded(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match="s: no tiles"):
        run(tiles_of(slide, 0), tmp_path)
    bad = encoder()
    with torch.no_grad():
        bad.model.norm.bias[3] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(EmbeddingError, match=r"8 of 8 tiles .* not finite, the first at \(0, 0\)"):
        run(tiles_of(slide), tmp_path, bad)
    assert not (tmp_path / "s.h5").exists()
    with pytest.raises(ValueError, match="batch_size 0"):
        run(tiles_of(slide), tmp_path, batch_size=0)


def test_features_are_checked() -> None:
    features, coords = np.zeros((3, 8), np.float32), np.zeros((3, 2), np.int64)
    check_features(features, coords, "s", width=8)
    with pytest.raises(EmbeddingError, match=r"s: features of width 8; the slide encoder takes 9"):
        check_features(features, coords, "s", width=9)
    with pytest.raises(EmbeddingError, match="3 features, 2 coordinates"):
        check_features(features, coords[:2], "s")
    with pytest.raises(EmbeddingError, match="no tiles"):
        check_features(features[:0], coords[:0], "s")
    features[1, 2] = np.inf
    with pytest.raises(EmbeddingError, match="1 of 3 tiles"):
        check_features(features, coords, "s")


def test_half_written_features_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((9, 4)), np.zeros((9, 2))
    whole = (tmp_path / "f.h5").read_bytes()
    (tmp_path / "f.h5").write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"f\.h5"):
        read_features(tmp_path / "f.h5")


@given(st.integers(0, 30), st.integers(1, 9))
def test_reading_ahead_changes_nothing(number: int, depth: int) -> None:
    assert list(read_ahead(iter(range(number)), depth)) == list(range(number))


def test_reading_ahead_is_bounded_and_ends() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    before = threading.active_count()
    ahead = read_ahead(items(), 4)
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 6
    assert threading.active_count() == before

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(read_ahead(broken(), 3))


@pytest.mark.multiproc
@pytest.mark.parametrize("workers", [0, 2])
def test_tiles_come_in_order(slide: Path, workers: int) -> None:
    tiles, parts = tiles_of(slide), [range(4, 9), range(20, 28)]
    found = list(read_tiles(tiles, parts, Resize(32, 37), workers=workers))
    assert [index for index, _ in found] == [*range(4, 9), *range(20, 28)]
    assert all(isinstance(p, np.ndarray) and p.shape == (32, 32, 3) for _, p in found)

"""Score maps: every patch at its position, for all sources of coordinates."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cite.score_maps import (
    Layout,
    draw_score_maps,
    find_patches,
    layout_from_h5,
    layout_from_names,
    layouts_from_csv,
    score_map,
)
from pathcore.rows import read_csv
from tests.cite.test_classifier import make
from tests.wsi.qupath import read_valid
from xtuner_add.cli import main


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1), st.integers(1, 50))
def test_every_patch_of_a_grid_in_its_own_cell(places: set[tuple[int, int]], patch_px: int) -> None:
    coords = np.array(sorted(places)) * patch_px + 1000
    scores = np.random.default_rng(0).random((len(coords), 3))
    cells = score_map(scores, coords, patch_px)
    assert (~np.isnan(cells[..., 0])).sum() == len(coords)
    found = cells[~np.isnan(cells[..., 0])]
    assert np.allclose(np.sort(found, axis=0), np.sort(scores, axis=0))


def test_overlapping_patches_are_averaged() -> None:
    coords = np.array([[0, 0], [50, 0]])
    cells = score_map(np.array([[0.0], [1.0]]), coords, 100)
    assert cells[..., 0].tolist() == [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]


def test_places_on_no_grid_and_too_far_apart() -> None:
    cells = score_map(np.eye(2), np.array([[0, 0], [101, 37]]), 64)
    assert 4 <= cells.shape[0] * cells.shape[1] < 200
    with pytest.raises(ValueError, match="check the coordinates"):
        score_map(np.eye(2), np.array([[0, 0], [10**7, 10**7]]), 1)
    with pytest.raises(ValueError, match="0 scores and 0 coordinates"):
        score_map(np.empty((0, 2)), np.empty((0, 2), dtype=np.int64), 8)


def test_layouts(tmp_path: Path) -> None:
    named = layout_from_names(["s_0_0.png", "s_256_0.png"], 256)
    assert named.is_known
    assert named.coords_px.tolist() == [[0, 0], [256, 0]]
    numbered = layout_from_names([f"s_{i}.png" for i in range(5)], 10)
    assert not numbered.is_known
    assert numbered.coords_px.tolist() == [[0, 0], [10, 0], [20, 0], [0, 10], [10, 10]]
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["coords"] = np.array([[5, 6], [7, 8]])
        file["coords"].attrs["patch_size_level0"] = 512
    layout = layout_from_h5(tmp_path / "s.h5", ["a", "b"])
    assert (layout.coords_px.tolist(), layout.patch_px) == ([[5, 6], [7, 8]], 512)
    with pytest.raises(ValueError, match=r"s\.h5: .* \(2, 2\), but the slide has 3 patches"):
        layout_from_h5(tmp_path / "s.h5", ["a", "b", "c"])
    table = tmp_path / "c.csv"
    table.write_text("name,x,y\na,1,2\nb,3,4\n")
    (read,) = layouts_from_csv(table, {"s": ["b", "a"]}, 8).values()
    assert read.coords_px.tolist() == [[3, 4], [1, 2]]
    with pytest.raises(ValueError, match=r"c\.csv: no coordinates of z"):
        layouts_from_csv(table, {"s": ["z"]}, 8)
    table.write_text("name,x,y\na,1,left\n")
    with pytest.raises(ValueError, match=r"c\.csv:2: expected two numbers"):
        layouts_from_csv(table, {}, 8)
    table.write_text("file,x,y\n")
    with pytest.raises(ValueError, match="no column name; found file, x, y"):
        layouts_from_csv(table, {}, 8)


def test_the_picture_shows_the_scores(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * 10
    pictures = []
    for value in (0.1, 0.9):
        scores = np.array([[value, 1 - value]] * 4)
        draw_score_maps(tmp_path / "m.png", scores, Layout(("",) * 4, coords, 10), ["a", "b"], "s")
        with Image.open(tmp_path / "m.png") as image:
            pictures.append(np.asarray(image.convert("RGB"), dtype=float))
    assert pictures[0].shape == pictures[1].shape
    changed = np.abs(pictures[0] - pictures[1]).max(axis=2) > 30
    assert 0.05 < changed.mean() < 0.9


def test_natural_order_and_slides(tmp_path: Path) -> None:
    for name in ("b_10.png", "b_9.png", "a_0.jpg", "notes.txt", "_x.png"):
        (tmp_path / name).touch()
    assert find_patches(tmp_path) == {"a": ["a_0.jpg"], "b": ["b_9.png", "b_10.png"]}
    with pytest.raises(FileNotFoundError, match="no images with names"):
        (tmp_path / "empty").mkdir()
        find_patches(tmp_path / "empty")


def test_by_command(tmp_path: Path) -> None:
    make("mean").save(tmp_path / "classifier")
    patches = tmp_path / "patches"
    patches.mkdir()
    generator = np.random.default_rng(0)
    for name in ("s_a, b_0_0", "s_a, b_40_0", "t_0", "t_1"):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(patches / f"{name}.png")
    (patches / "t_1.png").write_bytes(b"broken")
    words = [str(tmp_path / name) for name in ("classifier", "patches", "out")]
    options = ["--patch-px", "40", "--map-format", "png", "--map-format", "geojson"]
    result = CliRunner().invoke(main, ["cite-score-maps", *words, *options])
    assert result.exit_code == 3
    assert "t_1.png': not a readable image" in result.stderr
    assert "Wrote 1 slide " in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").glob("[st].*")) == [
        *("s.csv", "s.geojson", "s.png")
    ]
    first, second = read_valid(tmp_path / "out" / "s.geojson")
    assert second["geometry"]["coordinates"][0][0] == [40, 0]
    found = first["properties"]["measurements"]
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert first["properties"]["classification"]["name"] == max(found, key=lambda c: found[c])
    rows = [row for _, row in read_csv(tmp_path / "out" / "s.csv")]
    assert list(rows[0]) == ["name", "x", "y", "score_0", "score_1"]
    name, x, _, *scores = rows[1].values()
    assert (name, x) == ("s_a, b_40_0.png", "40")
    assert sum(map(float, scores)) == pytest.approx(1, abs=1e-5)

    # Nothing is drawn twice, further formats are; another classifier needs a folder of its own.
    drawn = (tmp_path / "out" / "s.png").stat().st_mtime_ns
    again = CliRunner().invoke(main, ["cite-score-maps", *words, *options])
    assert again.exit_code == 3
    assert (tmp_path / "out" / "s.png").stat().st_mtime_ns == drawn
    Image.fromarray(pixels).save(patches / "t_1.png")
    options += ["--retry-skipped", "--map-format", "ome-tiff"]
    assert CliRunner().invoke(main, ["cite-score-maps", *words, *options]).exit_code == 3
    assert len(list((tmp_path / "out").glob("s.*"))) == 4
    assert "positions unknown" in (tmp_path / "out" / "skipped.jsonl").read_text()
    make("linear").save(tmp_path / "other")
    other = [str(tmp_path / "other"), *words[1:], *options]
    refused = CliRunner().invoke(main, ["cite-score-maps", *other])
    assert refused.exit_code == 1
    assert "was begun with other settings (classifier." in refused.stderr

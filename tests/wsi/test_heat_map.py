"""Scores of patches as GeoJSON and as OME-TIFF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.wsi.qupath import read_valid
from wsi.heat_map import PatchScores, write_score_map

COORDS = np.array([[0, 0], [256, 0], [19_744, 9_744], [5000, 5000], [5128, 5000]])
VALUES = np.array([0.1, 0.9, 0.5, 0.25, 0.75], np.float32)
ATTRIBUTES = {"level0_width": 20_000, "level0_height": 10_000, "mpp_level0": 0.25}


@pytest.fixture
def scores() -> PatchScores:
    return PatchScores.with_attributes(
        "S.1", COORDS, 256, {"attention": VALUES, "rank <1>": VALUES * 2}, ATTRIBUTES
    )


def test_an_image_in_register_with_the_slide(scores: PatchScores, tmp_path: Path) -> None:
    path = write_score_map(tmp_path, scores, "ome-tiff")
    assert path.name == "S.1.ome.tif"
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        [series] = tiff.series
        assert series.axes == "CYX" and series.dtype == np.float32
        # 8 pixels per patch of 256, so 32 level-0 pixels and 8 micrometres per pixel.
        shapes = [level.shape for level in series.levels]
        assert shapes == [(2, 313, 625), (2, 157, 313)]
        assert all(level.keyframe.is_tiled for level in series.levels)
        image = series.asarray()
        coarse = series.levels[1].asarray()
        root = ElementTree.fromstring(tiff.ome_metadata or "")
    [pixels] = [e for e in root.iter() if e.tag.endswith("}Pixels")]
    assert [pixels.get(f"PhysicalSize{axis}") for axis in "XY"] == ["8.0", "8.0"]
    names = [e.get("Name") for e in root.iter() if e.tag.endswith("}Channel")]
    assert names == ["attention", "rank <1>"]
    assert (image[0, :8, :8] == VALUES[0]).all() and (image[0, :8, 8:16] == VALUES[1]).all()
    assert image[0, 308, 620] == VALUES[2]  # the last patch ends at the corner of the slide
    x, y = 5000 // 32, 5000 // 32
    assert image[0, y + 1, x + 1] == VALUES[3] and image[0, y + 1, x + 10] == VALUES[4]
    assert image[0, y + 1, x + 5] == pytest.approx((VALUES[3] + VALUES[4]) / 2)  # they overlap
    assert np.array_equal(image[1], image[0] * 2) and (image == 0).mean() > 0.9
    assert np.array_equal(coarse, image[:, ::2, ::2])


def test_without_size_and_resolution(tmp_path: Path) -> None:
    bare = PatchScores.with_attributes("s", COORDS[:2] + 100, 50, {"a": VALUES[:2]}, {})
    with tifffile.TiffFile(write_score_map(tmp_path, bare, "ome-tiff")) as tiff:
        assert tiff.series[0].shape == (24, 65)
        assert "PhysicalSize" not in (tiff.ome_metadata or "")


def test_squares_carry_the_scores(scores: PatchScores, tmp_path: Path) -> None:
    path = write_score_map(tmp_path, scores, "geojson")
    features = read_valid(path)
    assert [f["geometry"]["coordinates"][0][0] for f in features] == COORDS.tolist()
    found = [f["properties"]["measurements"]["attention"] for f in features]
    assert found == VALUES.tolist()


def test_picture_has_a_panel_for_each_score(scores: PatchScores, tmp_path: Path) -> None:
    sizes = []
    for names in (("a",), ("a", "b", "c")):
        own = replace(scores, scores=dict.fromkeys(names, VALUES))
        with Image.open(write_score_map(tmp_path, own, "png")) as image:
            sizes.append(image.size)
            colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert sizes[1][0] > 2 * sizes[0][0] and sizes[1][1] == sizes[0][1]
    assert len(colours) > len(set(VALUES.tolist()))

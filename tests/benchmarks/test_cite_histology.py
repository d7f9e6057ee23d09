from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.cite_histology import (
    GRADES,
    PATCH_PX,
    Canvas,
    draw,
    make_fields,
    make_slides,
    read_fields,
    tiles,
)
from cite.splits import slide_id


def test_shares_of_tissue_are_those_of_the_plan() -> None:
    shares = (("glands", 0.5), ("cell nests", 0.3), ("fat", 0.2))
    image, regions = draw(Canvas(128, shares, "train", 3))
    assert image.shape == (128, 128, 3)
    found = np.bincount(regions.ravel(), minlength=3) / regions.size
    np.testing.assert_allclose(found, [0.5, 0.3, 0.2], atol=1e-3)
    again, _ = draw(Canvas(128, shares, "train", 3))
    np.testing.assert_array_equal(image, again)


def test_tiles_cover_a_canvas() -> None:
    canvas = np.arange(128 * 128).reshape(128, 128)
    cut = tiles(canvas)
    assert cut.shape == (4, PATCH_PX, PATCH_PX)
    np.testing.assert_array_equal(cut[1], canvas[:64, 64:])


@pytest.mark.slow
def test_slides_and_fields_in_their_files(tmp_path: Path) -> None:
    make_slides(tmp_path, train=2, val=1, patches=4, workers=1)
    for file, count in (("train_all.txt", 2), ("val.txt", 1)):
        rows = [line.rsplit(" ", 1) for line in (tmp_path / file).read_text().splitlines()]
        assert len(rows) == 3 * 4 * count
        assert {label for _, label in rows} == {str(c) for c in range(len(GRADES))}
        assert len({slide_id(name) for name, _ in rows}) == 3 * count
        for name, _ in rows:
            with Image.open(tmp_path / "patches" / name) as patch:
                assert patch.size == (PATCH_PX, PATCH_PX)
    make_fields(tmp_path / "fields", canvases=2, workers=1)
    pixels, captions = read_fields(tmp_path / "fields")
    assert pixels.shape == (32, PATCH_PX, PATCH_PX, 3)
    assert len(captions) == 32
    assert not any("differentiated" in text for text in captions)

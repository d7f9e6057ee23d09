from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.gigapath_embedding import WAYS, make_encoder, make_slide
from wsi.features import FolderTiles
from wsi.store import read_features


@pytest.mark.slow
def test_all_ways_embed_the_same_tissue(tmp_path: Path) -> None:
    make_slide(tmp_path / "slide.svs", 1024)
    make_encoder(tmp_path / "encoder")
    numbers = {
        name: way(tmp_path / "slide.svs", tmp_path / "encoder", tmp_path / name)
        for name, way in WAYS.items()
    }
    assert numbers["images"] == numbers["ours, images"] == 12
    assert abs(numbers["ours"] - numbers["floor"]) <= 4
    theirs = FolderTiles.find(tmp_path / "images")
    mended = FolderTiles.find(tmp_path / "ours, images" / "output" / "slide.svs")
    assert np.array_equal(theirs.coords, mended.coords)
    pairs = zip(theirs.read(range(12)), mended.read(range(12)), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    (path,) = (tmp_path / "ours" / "features").rglob("slide.h5")
    features, coords = read_features(path)
    assert len(features) == numbers["ours"] and (coords % 256 == 0).all()

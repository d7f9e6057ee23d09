"""The methods that the benchmark compares give the same patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.extraction import (
    as_trident,
    cut,
    make_rows,
    make_slides,
    openslide_kept,
    published_script,
)
from pathgen.annotations import read_annotations
from wsi.extraction import OutputSettings, extract


def test_every_way_writes_the_same_patches(tmp_path: Path) -> None:
    slides = make_slides(tmp_path / "slides", 2, 1800)
    rows = make_rows(slides, 7)
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps(rows))
    for name in ("script", "openslide", "trident"):
        (tmp_path / name).mkdir()
    published_script(rows, slides[0].parent, tmp_path / "script")
    parts = cut(rows, 3)
    assert sorted(map(len, parts)) == [1, 3, 3]
    for part in parts:
        openslide_kept((part, slides[0].parent, tmp_path / "openslide", "png"))
        as_trident((part, slides[0].parent, tmp_path / "trident", "png"))
    extract(
        lambda: read_annotations(annotations),
        slides[0].parent,
        tmp_path / "ours",
        settings=OutputSettings(),
        source={},
        progress=False,
    )
    names = {path.name for path in (tmp_path / "script").iterdir()}
    assert len(names) == 14
    for name in names:
        ours = tmp_path / "ours" / name
        for other in ("openslide", "trident"):
            assert (tmp_path / other / name).read_bytes() == ours.read_bytes()
        if name.endswith("png"):
            rgba = np.asarray(Image.open(tmp_path / "script" / name))
            assert np.array_equal(rgba[..., :3], np.asarray(Image.open(ours)))
        else:
            assert (tmp_path / "script" / name).read_bytes() == ours.read_bytes()

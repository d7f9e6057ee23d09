from __future__ import annotations

import pytest

from benchmarks.gigapath_scanner import cosines


def test_only_grids_of_level0_pixels_depend_on_the_scanner() -> None:
    found = cosines(columns=5, rows=4)
    assert found["mean"] == pytest.approx(1, abs=1e-6)
    assert found["trident"] == pytest.approx(1, abs=1e-6)
    for name in ("pipeline", "lazyslide", "mean --grid-px 256"):
        assert found[name] < 0.999

"""Real slides and annotations, if this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "XTUNER_ADD_TEST_DATA"
"""Names a folder with `slides/small_HE.svs` (the CMU-1-Small-Region slide of OpenSlide's test data)
and `pathgen/PathGen-1.6M_sample.json` (rows of the published PathGen-1.6M)."""


def real_file(name: str) -> Path:
    """Returns a file of the folder; skips the test that asks where it is not there."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set")
    path = Path(folder, name)
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path

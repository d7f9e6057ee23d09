"""`kill -9` at fifty random moments: nothing is lost, duplicated or incomplete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.wsi.slides import tissue_pixels, write_svs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout,workers,kills", [("files", 2, 25), ("shards", 2, 15), ("files", 1, 10)]
)
def test_killed_again_and_again(tmp_path: Path, layout: str, workers: int, kills: int) -> None:
    for number in range(2):
        write_svs(tmp_path / "slides" / f"s{number}.svs", tissue_pixels(600, 500, seed=number))
    generator = np.random.default_rng(0)
    rows: list[list[Any]] = [
        [n, f"s{n % 2}", *generator.integers(0, 400, 2).tolist(), 96, 96, f"caption {n}"]
        for n in range(1, 61)
    ]
    job = {
        "rows": rows,
        "slides": str(tmp_path / "slides"),
        "root": str(tmp_path),
        "layout": layout,
        "workers": workers,
        "kills": kills,
        "seed": kills,
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.wsi.killer", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"KILLS {kills}" in result.stdout
    assert "LEFTOVERS ['.job']" in result.stdout

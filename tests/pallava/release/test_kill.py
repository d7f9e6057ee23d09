"""Killing a converter at any moment never leaves an incomplete folder that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pallava.release.pth_to_hf import convert_checkpoint
from tests.pallava.goldens import CROSSATTN_STATE, TINY_LLAMA
from tests.pallava.release.models import save_adapter, save_llama
from tests.pallava.release.test_pth_to_hf import recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def kill(kills: int, root: Path, seed: int = 0, **job: Any) -> None:
    root.mkdir()
    job |= {"root": str(root), "kills": kills, "seed": seed}
    result = subprocess.run(
        [sys.executable, "-m", "tests.pallava.release.killer", json.dumps(job)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert f"KILLS {kills} " in result.stdout


@pytest.mark.parametrize("seed", [0, 1])
def test_merge(tmp_path: Path, seed: int) -> None:
    base = save_llama(tmp_path / "base", num_hidden_layers=4)
    adapter = save_adapter(base, tmp_path / "adapter")
    kill(20, tmp_path / "runs", seed, kind="merge", paths=[str(base), str(adapter)])


def test_pth_to_hf(tmp_path: Path) -> None:
    job = {"kind": "pth-to-hf", "paths": [str(CROSSATTN_STATE)], "recipe": asdict(recipe(tmp_path))}
    kill(24, tmp_path / "conversions", **job)


def test_export(tmp_path: Path) -> None:
    convert_checkpoint(CROSSATTN_STATE, recipe(tmp_path), tmp_path / "converted")
    paths = [str(TINY_LLAMA), str(tmp_path / "converted")]
    kill(24, tmp_path / "exports", kind="export", paths=paths)

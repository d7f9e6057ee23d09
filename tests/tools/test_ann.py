"""`python tools/ann.py`, as users type it, against the published files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cite"


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "ann.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PatchGastric folder in its real layout, with empty patches."""
    folder = tmp_path_factory.mktemp("gastric")
    patches = folder / "data" / "patches_captions"
    patches.mkdir(parents=True)
    for name in (GOLDEN / "ann_filelist_shuffled.txt").read_text().split():
        (patches / name).touch()
    shutil.copyfile(GOLDEN / "ann_captions.csv", folder / "data" / "captions.csv")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_options_the_published_files_in_sorted_order(data: Path) -> None:
    result = run(cwd=data)
    assert result.returncode == 0, result.stderr
    expected = files(GOLDEN / "ann_sorted")
    del expected["train_3_0.2_sortFalse_seed7.txt"]
    assert files(data / "data" / "gastric_cls3_ann") == expected
    assert "Slides by class: [62, 48, 63]" in result.stdout
    assert "[39, 26, 37] to train, [150, 124, 151] to validate" in result.stdout
    assert "1 name without a slide id" in result.stdout
    assert "2 slides have no patches" in result.stdout


def test_any_listing_order(data: Path, tmp_path: Path) -> None:
    order = GOLDEN / "ann_filelist_shuffled.txt"
    result = run("--listing-order", order, "--output", tmp_path / "ann", cwd=data)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "ann") == files(GOLDEN / "ann_shuffled")


def test_slides_drawn_at_random(data: Path, tmp_path: Path) -> None:
    options = ("--no-sort", "--num-slides", "3", "--train-seed", "7", "--output", tmp_path / "ann")
    result = run(*options, cwd=data)
    assert result.returncode == 0, result.stderr
    name = "train_3_0.2_sortFalse_seed7.txt"
    assert (tmp_path / "ann" / name).read_bytes() == (GOLDEN / "ann_sorted" / name).read_bytes()


def test_the_file_systems_order_gives_the_same_slides_to_validation(
    data: Path, tmp_path: Path
) -> None:
    result = run("--listing-order", "os", "--output", tmp_path / "ann", cwd=data)
    assert result.returncode == 0, result.stderr
    name = "val_0.8.txt"
    found = set((tmp_path / "ann" / name).read_text().splitlines())
    assert found == set((GOLDEN / "ann_sorted" / name).read_text().splitlines())


def test_missing_data_is_named_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--data", "nowhere"), "patches_captions.zip"),
        (("--captions", "nowhere.csv"), "nowhere.csv: no such file"),
        (("--listing-order", "nowhere.txt"), "expected sorted, os, or a file"),
        (("--val", "0.001"), "class 0 has no slide with patches for validation"),
    ):
        result = run(*options, "--output", tmp_path / "ann", cwd=data)
        assert result.returncode == 1
        assert message in result.stderr
        assert not (tmp_path / "ann").exists()


def test_few_slides_and_folders_of_patches_are_said(data: Path, tmp_path: Path) -> None:
    result = run("--num-slides", "2", "--num-slides", "40", "--output", tmp_path / "ann", cwd=data)
    assert result.returncode == 0
    assert "train_40: class 0 has only 13 training slides" in result.stdout
    assert "train_2:" not in result.stdout
    (tmp_path / "patches" / "slide1").mkdir(parents=True)
    result = run("--patches", tmp_path / "patches", cwd=data)
    assert result.returncode == 1
    assert "contains folders (slide1, ...) instead of patches" in result.stderr

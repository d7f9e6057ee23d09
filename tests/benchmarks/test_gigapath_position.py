"""The synthetic slides differ only in the positions of their tiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.__main__ import QUICK, names
from benchmarks.gigapath_position import (
    BLOB,
    GAP,
    draw_cohort,
    draw_kinds,
    grid,
    main,
    mean_pooling,
)


def test_classes_have_the_same_tiles_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    for touching in (True, False) * 10:
        kinds = draw_kinds(touching, generator)
        assert kinds.bincount(minlength=3).tolist() == [len(kinds) - 2 * BLOB, BLOB, BLOB]
        places = grid().float()
        distance = torch.cdist(places[kinds == 1], places[kinds == 2]).min()
        assert distance == 1 if touching else distance > GAP


def test_means_of_tiles_tell_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(3, 16, generator=generator)
    train, test = (draw_cohort(300, prototypes, generator) for _ in range(2))
    assert abs(mean_pooling(train, test) - 0.5) < 0.12


def test_figures_and_picture(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    image, figures = tmp_path / "position.png", tmp_path / "figures.json"
    result = CliRunner().invoke(
        main, ["--quick", "--image", str(image), "--json", str(figures)], catch_exceptions=False
    )
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert len(found) == 3
    assert all(len(values) == 2 and all(0 <= v <= 1 for v in values) for values in found.values())
    assert Image.open(image).width > 1000
    assert "gigapath_position" in names()
    assert "gigapath_position" in QUICK

"""The benchmark of CITE's training step runs and compares equal computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import QUICK, names
from benchmarks.cite_step import BASELINES, Bench, main


def test_every_case_is_measured_beside_its_baseline(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--quick", "--rounds", "2", "--json", str(path)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    figures = {row["name"]: row for row in json.loads(path.read_text())}
    assert set(BASELINES) | set(BASELINES.values()) == set(figures)
    assert all(row["wall_s"] > 0 for row in figures.values())
    assert {name for name, row in figures.items() if row["ratio"]} == set(BASELINES)


def test_sides_that_differ_are_not_compared() -> None:
    bench = Bench(quick=True, batch_size=2)
    assert max(bench.check()) < 1e-5
    with torch.no_grad():
        bench.baseline.prompt.normal_()
    with pytest.raises(RuntimeError, match="the two sides differ"):
        bench.check()


def test_it_is_listed_and_quick() -> None:
    assert "cite_step" in names()
    assert "cite_step" in QUICK

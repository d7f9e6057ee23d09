"""The benchmark of the slide encoder runs and compares equal computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import QUICK, names
from benchmarks.gigapath_slide_encoder import (
    BF16,
    FLOOR,
    FLOORS,
    OURS,
    STRAIGHTFORWARD,
    TRAINING,
    Bench,
    attention_flops,
    main,
    measure,
)


def test_every_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    threads = torch.get_num_threads()
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--quick", "--json", str(path)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert {row["num_tiles"] for row in rows} == {300, 500}
    assert all(row["cpu_s"] > 0 for row in rows)
    compared = {row["name"] for row in rows if row["ratio"] is not None}
    assert compared == {OURS, BF16, TRAINING}
    floors = {FLOOR, *FLOORS.values()}
    assert {row["name"] for row in rows if row["over_floor"] is None} == floors


@torch.no_grad()
def test_training_computes_the_gradients_of_the_other_side() -> None:
    bench, found = Bench(2, quick=True), []
    x, coords = bench.inputs(150)
    bench.model.zero_grad = lambda set_to_none: found.append(  # type: ignore[method-assign]
        [parameter.grad for parameter in bench.model.parameters()]
    )
    for case in (bench.training, bench.straightforward_training):
        case(x, coords)
        for parameter in bench.model.parameters():
            parameter.grad = None
    ours, theirs = found
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
    assert len(pairs) > 30
    for a, b in pairs:
        assert (a - b).norm() <= 1e-4 * max(b.norm(), 1e-3)


@torch.no_grad()
def test_sides_that_differ_are_not_compared() -> None:
    bench = Bench(1, quick=True)
    measure(bench, 1100, 1, [STRAIGHTFORWARD, OURS])
    bench.table.neg_()
    with pytest.raises(RuntimeError, match="the two sides differ"):
        measure(bench, 100, 1, [STRAIGHTFORWARD, OURS])


def test_operations_of_attention_are_those_of_real_tokens() -> None:
    bench = Bench(1, quick=True, with_table=False)
    # 64 wide in 16 heads of 4; every token with every other in the first branch alone.
    pairs = 16 * sum(
        sum(len(range(group, 100, ratio)) ** 2 for group in range(ratio)) / ratio
        for ratio in (1, 2, 4, 8, 16)
    )
    assert attention_flops(bench.model, 100) == 4 * 4 * pairs


def test_it_is_listed_and_quick() -> None:
    assert "gigapath_slide_encoder" in names()
    assert "gigapath_slide_encoder" in QUICK

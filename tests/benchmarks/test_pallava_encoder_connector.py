"""The benchmark runs, compares equal computations, and counts what its labels say."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import QUICK, names
from benchmarks.pallava_encoder_connector import BASELINES, Bench, main, measure_memory


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    result = CliRunner().invoke(main, ["--quick", "--rounds", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "46 tiles, 54 with padding" in result.output
    return {row.pop("name"): row for row in json.loads(path.read_text())}


def test_every_case_is_measured_beside_its_baseline(
    figures: dict[str, dict[str, float]],
) -> None:
    assert set(BASELINES) | set(BASELINES.values()) == set(figures)
    for row in figures.values():
        assert row["wall_s"] > 0
        assert row["gflop"] > 0


def test_operations_are_those_of_the_layers_that_run(
    figures: dict[str, dict[str, float]],
) -> None:
    straight, packed, released = (
        figures[f"encoder, {kind}"]["gflop"]
        for kind in ("straightforward", "packed", "released mode")
    )
    assert packed / released == pytest.approx(46 / 6, rel=1e-6)
    # 3 layers forward, 2 of them again and backward, of 54 tiles; 2 layers forward of 46.
    assert straight / packed > 2.5
    loop, together = figures["connector, one by one"], figures["connector, packed"]
    assert loop["gflop"] == pytest.approx(together["gflop"])
    assert figures["connector, straightforward"]["gflop"] > together["gflop"]


def test_our_encoder_keeps_nothing(figures: dict[str, dict[str, float]]) -> None:
    assert figures["encoder, packed"]["saved_mib"] == 0
    assert figures["encoder, straightforward"]["saved_mib"] > 0
    packed, straight = figures["connector, packed"], figures["connector, straightforward"]
    assert packed["saved_mib"] < straight["saved_mib"]


def test_sides_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(quick=True)
    assert bench.check() < 1e-5
    ours = bench.encoder.features
    monkeypatch.setattr(bench.encoder, "features", lambda pixels: ours(pixels) + 1)
    with pytest.raises(RuntimeError, match="the two sides differ"):
        bench.check()


def test_memory_is_measured_without_the_timing() -> None:
    measured = measure_memory(Bench(quick=True), "encoder, packed")
    assert set(measured) == {"gflop", "saved_mib", "peak_mib"}


def test_make_bench_knows_every_benchmark() -> None:
    assert "pallava_encoder_connector" in names()
    assert "straightforward" not in names()
    assert set(QUICK) <= set(names())

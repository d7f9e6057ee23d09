from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks import check


@pytest.fixture
def ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(check, "GUARDED", {"image_input": (["--quick"], ["500 x 400"])})
    return tmp_path / "ratios.json"


def run(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(check.main, ["--ratios", str(file), "--repeats", "1", *arguments])


@pytest.mark.slow
def test_a_planted_loss_and_a_missing_benchmark_are_found(ratios: Path) -> None:
    result = run(ratios)
    assert result.exit_code == 2
    assert "does not exist; --update writes it" in result.output

    assert run(ratios, "--update").exit_code == 0
    written = json.loads(ratios.read_text())
    figures = written["image_input"]["500 x 400"]
    assert figures["range"] == [figures["ratio"]] * 2

    figures["ratio"] *= 10
    ratios.write_text(json.dumps(written))
    result = run(ratios)
    assert result.exit_code == 1
    assert "more than 15% is lost: image_input: 500 x 400" in result.output
    assert "another processor" not in result.output

    figures["processor"] = "8080, 1 cores"
    ratios.write_text(json.dumps(written))
    assert "of another processor (8080, 1 cores; " in run(ratios).output

    figures["ratio"] /= 100
    ratios.write_text(json.dumps(written))
    assert run(ratios).exit_code == 0

    ratios.write_text("{}")
    result = run(ratios)
    assert result.exit_code == 2
    assert "image_input has [], expected ['500 x 400']; --update image_input" in result.output


def test_the_best_of_the_repeats_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([{"a": 1.0, "b": 3.0}, {"a": 1.72, "b": 2.0}, {"a": 9.0, "b": 9.0}])
    monkeypatch.setattr(check, "measure", lambda _: next(runs))
    assert check.best_of("any", {"a": 2.0, "b": 3.0}, 3) == {"a": 1.72, "b": 3.0}


def test_committed_ratios_are_those_of_the_guarded_cases() -> None:
    committed = json.loads(check.RATIOS.read_text())
    assert {name: sorted(cases) for name, cases in committed.items()} == {
        name: sorted(cases) for name, (_, cases) in check.GUARDED.items()
    }
    for cases in committed.values():
        for figures in cases.values():
            least, most = figures["range"]
            assert 1 < least <= figures["ratio"] <= most

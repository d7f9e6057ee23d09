"""The whole road from the command line, at the size of `--quick`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from xtuner_add.cli import main
from xtuner_add.demo.pathgen import scores
from xtuner_add.demo.stages import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def demo(work_dir: Path) -> Result:
    command = ["demo-pathgen", "--quick", "--seed", "5", "--work-dir", str(work_dir)]
    return CliRunner().invoke(main, command)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("demo") / "pathgen"
    result = demo(work_dir)
    assert result.exit_code == 0, result.output[-3000:]
    assert "report.html" in result.output
    return work_dir


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "summary.json").read_text())


def test_summary_states_every_score_with_its_chance(summary: dict[str, Any]) -> None:
    """So little training promises no score; the models must have begun to learn."""
    for task in scores.TASKS:
        assert summary["chance"][task] == pytest.approx(1 / (7 if task == "tissue" else 2))
        for model in scores.MODELS:
            score = summary["zero_shot"][task][model]["balanced_accuracy"]
            assert score["low"] <= score["value"] <= score["high"]
    for name in scores.DIRECTIONS:
        for k in scores.KS:
            assert 0 < summary["retrieval_chance"][name][f"recall@{k}"] < 1
    assert summary["quick"]
    assert summary["seed"] == 5


def test_the_describer_learns(finished: Path) -> None:
    history = json.loads((finished / "describer" / "history.json").read_text())
    for task in ("name", *scores.STEPS):
        losses = [row["loss"] for row in history if row["task"] == task]
        assert sum(losses[-5:]) < 0.3 * 5 * losses[0], task


def test_every_patch_is_accounted_for(finished: Path, summary: dict[str, Any]) -> None:
    road = {row["command"]: row for row in summary["road"]}
    for row in summary["road"]:
        if row["command"] != "select-patches":  # it chooses, and says of which kind
            assert row["in"] - row["out"] == sum(row["reasons"].values()), row
    assert road["tile"]["reasons"] == {"resolution unknown": 1}
    order = ("select-patches", "describe", "revise", "filter-captions", "summarise", "extract")
    for before, after in itertools.pairwise(order):
        assert road[before]["out"] == road[after]["in"]
    assert road["extract"]["out"] == len(read_jsonl(finished / "captions" / "pairs.jsonl"))


def test_captions_are_the_describers(finished: Path) -> None:
    rows = read_jsonl(finished / "captions" / "pairs.jsonl")
    assert rows
    for row in rows:
        assert [step["step"] for step in row["provenance"]] == list(scores.STEPS)
        assert {step["backend"] for step in row["provenance"]} == {"local"}
        assert {step["model"].partition("@")[0] for step in row["provenance"]} == {"model"}
        assert row["caption"] == row["versions"]["summarise"]
        assert row["wsi_id"].startswith("archive_")
    exchanged = read_jsonl(finished / "captions" / "exchanged.jsonl")
    assert sorted(row["caption"] for row in exchanged) == sorted(row["caption"] for row in rows)
    assert [row["id"] for row in exchanged] == sorted(row["id"] for row in rows)


def test_teaching_archive_and_held_out_slides_stay_apart(finished: Path) -> None:
    for folder, group in (("teaching", "teaching"), ("archive", "archive")):
        names = {file.name for file in (finished / "patches" / folder).glob("*.png")}
        assert names
        assert all(name.startswith(group) for name in names)
    tested = {file.name for file in (finished / "tests").rglob("*.png")}
    assert all(name.startswith("held_out") for name in tested)


def test_report_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""\b(?:src|href)=["']([^"'#]+)""", page)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "{{" not in page


def test_rerun_repeats_what_is_lost_and_nothing_else(
    finished: Path, summary: dict[str, Any]
) -> None:
    kept = [finished / "captions/pairs.jsonl", finished / "clip/pairs/stage.json"]
    before = [file.stat().st_mtime_ns for file in kept]
    for file in (finished / "scores").rglob("metrics.json"):
        file.unlink()
    result = demo(finished)
    assert result.exit_code == 0, result.output[-3000:]
    assert [file.stat().st_mtime_ns for file in kept] == before
    again = json.loads((finished / "summary.json").read_text())
    for name in ("zero_shot", "retrieval", "captions", "road"):
        assert again[name] == summary[name]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "mine.svs").touch()
    result = demo(tmp_path)
    assert result.exit_code == 1
    assert "name a new folder" in result.output
    assert (tmp_path / "slides" / "mine.svs").exists()

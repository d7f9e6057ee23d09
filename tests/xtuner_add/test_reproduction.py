"""`xtuner-add reproduce`: cards, figures, and the cause of a difference."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from pallava.inference.decoding import Decoding
from pallava.records.prompts import find_prompt
from pallava.records.resizing import check_rule
from tests.xtuner_add.embedding_zip import write_tiles
from xtuner_add import cli
from xtuner_add.reproduction import (
    Measured,
    Reproduction,
    attribute,
    card_files,
    load_card,
    read_figure,
    read_items,
)

NUM_ITEMS = 400


def measured(hits: int, first: int = 0) -> Measured:
    """An arm that is right about `hits` of the items, from the item `first` on."""
    right = np.roll(np.arange(NUM_ITEMS) < hits, first)
    return Measured(100 * hits / NUM_ITEMS, (), {str(i): float(r) for i, r in enumerate(right)})


def test_the_one_change_that_meets_the_figure_explains_it() -> None:
    base = measured(200)
    arms = {("prompt", "plain"): measured(300), ("decoding", "beams"): measured(205, 7),
            ("subset", "tiny"): measured(240)}  # fmt: skip
    rows = attribute(75.0, 1.0, base, arms, scale=100.0)
    assert [(row.choice, row.explains) for row in rows] == [
        ("prompt", True), ("subset", False), ("decoding", False),
    ]  # fmt: skip
    assert rows[0].change == 25.0 and rows[0].remaining == 0.0
    assert rows[0].low is not None and 20 < rows[0].low < 25 < rows[0].high < 30


def test_nothing_explains_a_figure_that_is_reproduced_or_far_away() -> None:
    arms = {("prompt", "plain"): measured(300)}
    assert not any(r.explains for r in attribute(50.5, 1.0, measured(200), arms, scale=100.0))
    assert not any(r.explains for r in attribute(90.0, 1.0, measured(200), arms, scale=100.0))


def test_noise_that_happens_to_meet_the_figure_explains_nothing() -> None:
    """A change that is right about other items, as often as not, has an interval around 0."""
    base, other = measured(200), measured(204, 198)
    (row,) = attribute(51.0, 0.5, base, {("decoding", "t=1"): other}, scale=100.0)
    assert abs(row.remaining) <= 0.5
    assert row.low is not None and row.low < 0 < row.high
    assert not row.explains


def test_another_subset_is_compared_without_pairs() -> None:
    part = Measured(90.0, (), {f"other {i}": float(i < 90) for i in range(100)})
    (row,) = attribute(90.0, 1.0, measured(200), {("subset", "tiny"): part}, scale=100.0)
    assert row.explains
    assert row.low is not None and 30 < row.low < 40 < row.high < 50


def test_a_figure_without_items_has_to_move_by_more_than_the_tolerance() -> None:
    plain = Measured(75.0, ())
    (row,) = attribute(75.0, 1.0, Measured(70.0, ()), {("scoring", "ours"): plain})
    assert row.explains and row.low is None


# --- files ----------------------------------------------------------------------------------------


def test_figures_and_items_are_read_where_the_card_says(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"scores": [{"accuracy": 0.5}, "x"]}))
    assert read_figure(tmp_path, "metrics.json:scores > 0 > accuracy") == 0.5
    for where, message in (
        ("metrics.json:scores > 0 > auroc", "no 'auroc' of scores > 0 > auroc; found accuracy"),
        ("metrics.json:scores > 1", "expected a number, found 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_figure(tmp_path, where)
    (tmp_path / "predictions.csv").write_text("id,true,predicted\na,HP,HP\nb,HP,SSA\n")
    assert read_items(tmp_path, "predictions.csv:id:true=predicted") == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="no column name; found id, true, predicted"):
        read_items(tmp_path, "predictions.csv:name:true=predicted")
    (tmp_path / "details.jsonl").write_text('{"question_id": 3, "correct": 0.5}\n')
    assert read_items(tmp_path, "details.jsonl:question_id:correct") == {"3": 0.5}
    with pytest.raises(ValueError, match="line 1: expected id and correct"):
        read_items(tmp_path, "details.jsonl:id:correct")


def write_card(path: Path, **changes: Any) -> Path:
    """A card of `score`, which needs neither a model nor images."""
    content = {
        "title": "Two answers files",
        "published": {"value": 75.0, "source": "made up"},
        "tolerance": 1.0,
        "command": ["score", "pathvqa", "--data-path", "{data}", "--work-dir", "{out}"],
        "inputs": {"data": "questions", "answers": "folder of answers"},
        "figure": "metrics.json:scores > closed (yes/no) > accuracy > value",
        "items": "details.jsonl:question_id:correct",
        "scale": 100,
        "choices": {
            "prompt": {"short": ["--answers", "{answers}/short.json"],
                       "long": ["--answers", "{answers}/long.json"]},
            "missing": {"wrong": [], "skip": ["--missing", "skip"]},
            "scoring": {"ours": [],
                        "published": {"figure": "metrics.json:published > exact > overall"}},
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    questions = {
        str(i): {"question": f"is it {i}?", "image": "a.png", "answer": "yes"} for i in range(8)
    }
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    for name, hits in (("short", 2), ("long", 6)):
        answers = [{"question_id": str(i), "answer": "yes" if i < hits else "no"} for i in range(8)]
        (tmp_path / f"{name}.json").write_text(json.dumps(answers))
    write_card(tmp_path / "card.yml")
    return tmp_path


def reproduce(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        cli.main,
        ["reproduce", str(folder / "card.yml"), f"data={folder / 'questions.json'}",
         f"answers={folder}", "--work-dir", str(folder / "out"), *arguments],
    )  # fmt: skip


def test_command_names_the_cause_and_runs_nothing_twice(folder: Path) -> None:
    result = reproduce(folder)
    assert result.exit_code == 0, result.output
    assert "Differs: 25.00 measured, 75.00 published. Explained by prompt=long." in result.output
    report = json.loads((folder / "out" / "reproduction.json").read_text())
    assert report["explained_by"] == ["prompt=long"]
    assert [row["choice"] for row in report["choices"]] == ["prompt", "missing", "scoring"]
    assert report["interval"][0] < 25 < report["interval"][1]
    runs = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/metrics.json")}
    # The published scoring is read from the same run.
    assert {path.parent.name for path in runs} == {"published", "prompt=long", "missing=skip"}
    again = reproduce(folder, "--published", "25")
    assert "Reproduced: 25.00 measured, 25.00 published, within 1." in again.output
    assert runs == {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/metrics.json")}
    # Other data are asked again.
    (folder / "questions.json").write_text((folder / "questions.json").read_text() + "\n")
    assert reproduce(folder).exit_code == 0
    assert all(path.stat().st_mtime_ns > time for path, time in runs.items())


def test_a_change_that_fails_costs_itself_only(folder: Path) -> None:
    (folder / "long.json").unlink()
    result = reproduce(folder)
    assert result.exit_code == 3, result.output
    assert "Not run: prompt=long:" in result.output
    assert "No choice of the card brings it nearer" in result.output
    (folder / "short.json").unlink()
    failed = reproduce(folder, "--extra", "--compat original")  # another command: run again
    assert failed.exit_code == 1
    assert "short.json" in failed.output and "ended with 1" in failed.output


def test_a_run_that_skipped_something_is_named(folder: Path) -> None:
    answers = json.loads((folder / "short.json").read_text())
    (folder / "short.json").write_text(json.dumps(answers[:-1]))  # one question has no answer
    for _ in range(2):  # run, and read back
        result = reproduce(folder, "--published", "25")
        assert result.exit_code == 3, result.output
        assert "Not complete: published: something was skipped, see " in result.output
        report = json.loads((folder / "out" / "reproduction.json").read_text())
        assert list(report["incomplete"]) == ["published"]
    (folder / "short.json").write_text(json.dumps(answers))
    (folder / "out" / "published" / "arm.json").unlink()
    assert reproduce(folder, "--published", "25").exit_code == 0


def test_files_hold_no_secrets_of_an_address(folder: Path) -> None:
    card = yaml.safe_load((folder / "card.yml").read_text())
    inputs = {**card["inputs"], "judge": "endpoint"}
    ask = [*card["command"], "--judge", "{judge}"]
    write_card(folder / "card.yml", command=ask, inputs=inputs)
    address = "judge=http://user:password@127.0.0.1:9/v1?key=hidden"
    result = reproduce(folder, address)
    assert result.exit_code == 1, result.output
    assert "--judge http://127.0.0.1:9/v1 --answers" in result.output
    ask += ["--judge-model", "m", "--judge-retries", "0"]  # nobody is there; the scores are
    write_card(folder / "card.yml", command=ask, inputs=inputs)
    with patch.dict(os.environ, {"OPENAI_API_KEY": "x"}):
        result = reproduce(folder, address)
    assert "password" not in result.output and "hidden" not in result.output
    for path in (folder / "out").rglob("*"):
        if path.is_file():
            assert not any(word in path.read_bytes() for word in (b"password", b"hidden")), path
    report = json.loads((folder / "out" / "reproduction.json").read_bytes())
    assert report["inputs"]["judge"]["path"] == "http://127.0.0.1:9/v1"


def test_seeds_are_averaged(folder: Path) -> None:
    for seed, name in enumerate(("short", "long")):
        (folder / f"seed{seed}.json").write_text((folder / f"{name}.json").read_text())
    write_card(
        folder / "card.yml", seeds=[0, 1], choices={},
        command=["score", "pathvqa", "--data-path", "{data}", "--work-dir", "{out}",
                 "--answers", "{answers}/seed{seed}.json"],
    )  # fmt: skip
    result = reproduce(folder, "--published", "50")
    assert "Reproduced: 50.00 measured" in result.output
    assert "by seed 25.00, 75.00" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quilt"], "neither a file nor a known card"),
        (["{card}"], "data needed: data (questions); answers (folder of answers)"),
        (["{card}", "data=x", "answers=y", "model=z"], "no input model; expected data, answers"),
    ],
)
def test_wrong_use(folder: Path, arguments: list[str], message: str) -> None:
    words = [word.replace("{card}", str(folder / "card.yml")) for word in arguments]
    result = CliRunner().invoke(cli.main, ["reproduce", *words])
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_other_than_the_published_one_is_refused(folder: Path) -> None:
    write_card(folder / "card.yml", digests={"data": "0" * 64})
    result = reproduce(folder)
    assert result.exit_code == 2
    assert "expected the published file with sha256 0000" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerence": 1}, "unknown fields"),
        ({"choices": {"prompt": {"short": []}}}, "expected the published value and another"),
        ({"published": {"value": 1}}, "'source' is missing"),
    ],
)
def test_what_is_not_a_card_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_card(write_card(tmp_path / "card.yml", **change))


# --- shipped cards --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", card_files())
def test_shipped_cards_name_options_that_their_commands_have(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    run = Reproduction(card, dict.fromkeys(card.inputs, "given"), tmp_path)
    arms = [{}, *({choice: value} for choice, value in card.changes())]
    for changes in arms:
        arguments = run.command(card.arm(changes)[0], tmp_path / "out", card.seeds[0])
        command = cli.main.get_command(None, arguments[0])  # type: ignore[arg-type]
        assert command is not None
        # Parses every option and checks choices; paths need not exist to be parsed.
        options = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        used = {word for word in arguments if word.startswith("--")}
        assert used <= options, sorted(used - options)
        for word, value in pairwise(arguments):
            if value.startswith("prompt="):
                find_prompt(value.removeprefix("prompt="))
            elif word == "--decoding":
                Decoding.parse(value)
            elif word == "--image-resize":
                check_rule(value)


def test_card_of_pcam_on_a_twin(tmp_path: Path) -> None:
    """The shipped card, on embeddings of the published layout."""
    write_tiles(tmp_path, signal=0.6)
    arguments = [
        "reproduce", "gigapath-pcam", f"embeddings={tmp_path / 'tiles.zip'}",
        f"labels={tmp_path / 'tiles.csv'}", "--work-dir", str(tmp_path / "out"),
        "--extra", "--device cpu --recipe pcam_tiny",
    ]  # fmt: skip
    found = CliRunner().invoke(cli.main, [*arguments, "--published", "0", "--all"])
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "out/reproduction.json").read_text())["choices"]
    figures = {f"{row['choice']}={row['value']}": row["figure"] for row in rows}
    assert len(figures) == 6
    planted = figures["classifier=knn"]
    assert sum(abs(figure - planted) <= 0.005 for figure in figures.values()) == 1
    CliRunner().invoke(cli.main, [*arguments, "--published", str(planted)])
    report = json.loads((tmp_path / "out/reproduction.json").read_text())
    assert report["explained_by"] == ["classifier=knn"]


def test_cards_are_listed() -> None:
    result = CliRunner().invoke(cli.main, ["reproduce", "--list"])
    assert result.exit_code == 0
    assert set(card_files()) <= set(result.output.split())


def test_the_document_lists_every_card_with_its_figure() -> None:
    text = (Path(cli.__file__).parents[1] / "docs/reproduce.md").read_text()
    for name in card_files():
        published = load_card(name).published
        figure = "no figure" if published is None else f"{published:g}"
        assert f"| `{name}` | {figure} |" in text

"""Judging through a real HTTP server that fails, stalls and returns invalid replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pallava.evaluation.judge import SAMPLING, Verdicts, judge_answers, parse_score, summarise
from pathcore.chat_backends import AgentError, OpenAIBackend
from pathcore.chat_budget import Budget
from tests.pallava import goldens
from tests.pallava.evaluation.judge_server import JudgeServer, running_server
from xtuner_add import cli

PRICES = Budget(price_in=10.0, price_out=30.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_server() as running:
        yield running


def ask(
    server: JudgeServer,
    folder: Path,
    *candidates: str,
    budget: Budget | None = None,
    **changes: Any,
) -> Any:
    settings = {"model": "judge", "timeout_s": 60.0, "max_retries": 3} | changes
    answers = {name: name for name in candidates}
    references = dict.fromkeys(candidates, "necrosis")
    with closing(OpenAIBackend(server.url, sampling=SAMPLING, **settings)) as judge:
        return judge_answers(judge, answers, references, folder / "judge.sqlite", budget)


def test_scores_are_read_and_the_key_comes_from_the_environment(
    server: JudgeServer, tmp_path: Path
) -> None:
    found = ask(server, tmp_path, "score 8", "score 2.5")
    assert found.scores == {"score 8": 8.0, "score 2.5": 2.5}
    assert found.complete
    assert server.keys == {"Bearer secret"}
    assert b"secret" not in (tmp_path / "judge.sqlite").read_bytes()
    summary = summarise(found)
    assert summary["similarity"]["value"] == 52.5
    assert 25 <= summary["similarity"]["low"] <= summary["similarity"]["high"] <= 80


@pytest.mark.parametrize("trouble", ["fail500", "fail429", "stall"])
def test_a_server_that_recovers_is_asked_again(
    server: JudgeServer, tmp_path: Path, trouble: str
) -> None:
    patience = {"timeout_s": 0.5, "max_retries": 8} if trouble == "stall" else {}
    assert ask(server, tmp_path, trouble, **patience).scores == {trouble: 5.0}
    assert server.requests[trouble] >= 3


@pytest.mark.parametrize(
    "lie", ["words", "range", "twice", "brokenjson", "nochoices", "html", "always500"]
)
def test_lies_are_no_scores_and_are_asked_anew_by_the_next_run(
    server: JudgeServer, tmp_path: Path, lie: str
) -> None:
    found = ask(server, tmp_path, lie, "score 7", max_retries=1)
    assert found.scores == {"score 7": 7.0}
    assert list(found.unreadable) == [lie]
    assert found.unreadable[lie]
    assert not found.complete
    before = server.requests[lie]
    assert 1 < before <= 4
    ask(server, tmp_path, lie, "score 7", max_retries=1)
    assert server.requests[lie] > before
    assert server.requests["score 7"] == 1


def test_one_lie_is_forgiven(server: JudgeServer, tmp_path: Path) -> None:
    assert ask(server, tmp_path, "lie once").scores == {"lie once": 5.0}
    assert server.requests["lie once"] == 2


def test_nothing_is_asked_twice(server: JudgeServer, tmp_path: Path) -> None:
    names = [f"score {number}" for number in range(10)]
    first = ask(server, tmp_path, *names[:6])
    second = ask(server, tmp_path, *names)
    assert set(server.requests.values()) == {1}
    assert len(first.scores) == 6
    assert len(second.scores) == 10
    ask(server, tmp_path, *names, model="another")
    assert set(server.requests.values()) == {2}


def test_no_more_requests_than_allowed_run_at_a_time(server: JudgeServer, tmp_path: Path) -> None:
    ask(server, tmp_path, *[f"score {n / 10}" for n in range(30)], concurrency=3)
    assert 1 <= server.most_running <= 3


def test_the_ceiling_is_never_exceeded_and_a_higher_one_continues(
    server: JudgeServer, tmp_path: Path
) -> None:
    names = [f"score {number / 10}" for number in range(20)]
    each = PRICES.cost(100, 10)
    highest = PRICES.cost(2 * 1300, 2 * SAMPLING.max_tokens)  # asked twice, with a correction
    limited = replace(PRICES, max_cost=highest + 5 * each)
    found = ask(server, tmp_path, *names, budget=limited)
    assert 0 < len(found.scores) < 20
    assert found.cost == pytest.approx(len(found.scores) * each)
    assert found.cost <= highest + 5 * each
    assert len(found.not_asked) == 20 - len(found.scores)
    found = ask(server, tmp_path, *names, budget=replace(PRICES, max_cost=1.0))
    assert found.complete
    assert found.cost == pytest.approx(20 * each)
    assert set(server.requests.values()) == {1}


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_the_run(server: JudgeServer, tmp_path: Path, status: int) -> None:
    server.refuse = status
    with pytest.raises(AgentError, match="judge at http"):
        ask(server, tmp_path, *[f"score {n}" for n in range(10)], concurrency=1)
    assert sum(server.requests.values()) < 4


def test_one_answer_that_is_always_refused_blocks_nothing(
    server: JudgeServer, tmp_path: Path
) -> None:
    names = [*[f"score {n / 10}" for n in range(20)], "bad400", "filter400", "filtered"]
    each = PRICES.cost(100, 10)
    found = ask(server, tmp_path, *names[10:], budget=PRICES, concurrency=2)
    assert len(found.scores) == 10 and set(found.unreadable) == {*names[20:]}
    assert found.cost == pytest.approx(11 * each)  # what was filtered is paid for, too
    again = ask(server, tmp_path, *names, budget=PRICES, concurrency=2)
    assert len(again.scores) == 20 and set(again.unreadable) == {*names[20:]}
    assert again.cost == pytest.approx(21 * each)
    assert server.requests["bad400"] == 2  # costs nothing, and may have been mended
    assert server.requests["filter400"] == server.requests["filtered"] == 1
    assert all(server.requests[name] == 1 for name in names[:20])
    only = ask(server, tmp_path, *names, budget=PRICES)  # nothing is left to ask but this one
    assert set(only.unreadable) == {*names[20:]} and len(only.scores) == 20


def test_replies_under_way_are_kept_when_the_run_ends(server: JudgeServer, tmp_path: Path) -> None:
    names = [*[f"bad400 {n}" for n in range(3)], *[f"slow {n}" for n in range(3)]]
    with pytest.raises(AgentError, match="what is that"):
        ask(server, tmp_path, *names, budget=PRICES, concurrency=6)
    before = dict(server.requests)
    found = ask(server, tmp_path, *names[3:], budget=PRICES)
    assert len(found.scores) == 3 and found.cost == pytest.approx(3 * 1300 / 1e6)
    assert dict(server.requests) == before, "paid for already"


def test_settings_that_make_no_sense_are_refused(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = ["--judge", server.url, "--judge-model", "judge", "--max-cost", "1"]
    result = CliRunner().invoke(cli.main, [*arguments(server, tmp_path), *prices])
    assert result.exit_code == 2
    assert "--max-cost requires --judge-price-in" in result.output
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        ask(server, tmp_path, "score 1")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("{'score': 7}", 7),
        ('{"score": 7.5}', 7.5),
        ('```json\n{"score": "3"}\n```', 3),
        ("Score: 0", 0),
        ("score = 10", 10),
        ("8/10, both name necrosis", 8),
        ("I give 6 out of 10", 6),
        ("9", 9),
        ("**9**", 9),
        ('{"score": 1e1}', 10),
        ("score: 7,5", 7.5),
        ("7,5 / 10", 7.5),
        ("11", None),
        ("-1", None),
        ('{"score": -3}', None),
        ("{'score': 100}", None),
        ("12/10", None),
        ("score: 3, no, score: 4", None),
        ("<think>The organ is right, 8/10 for that.</think>\n3", 3),
        ("8/10 at first sight.</think> Score: 3", 3),
        ('<think>Not {"score": 9}.</think>{"score": 3}', 3),
        ("<|channel|>analysis<|message|>8/10?<|end|><|channel|>final<|message|>3", 3),
        ('<think>{"score": 9} for the organ, but', None),
        ("score: 7-8", None),  # a range is no score
        ("score: 7.5 \u2013 8", None),
        ('{"score": "7 to 8"}', None),
        ("7-8/10", None),
        ("7 \u2013 8 / 10", None),
        ("7 to 8 out of 10", None),
        ("score: 70%", None),
        ("score: 7%", None),
        ("score: 7/100", None),
        ("score: 7/10", 7),
        ('{"score": 7, "best": 8}', 7),
        ("score: 7 - the organ is right", 7),
        ("no idea", None),
        ("the 2 sentences differ", None),
        ("", None),
    ],
)
def test_replies_are_read(reply: str, score: float | None) -> None:
    assert parse_score(reply) == score


def test_one_score_has_no_interval() -> None:
    assert summarise(Verdicts({"a": 7.0}))["similarity"] == {"value": 70.0}
    assert summarise(Verdicts({"a": 7.0, "b": 9.0}))["similarity"].keys() == {
        "value", "low", "high"
    }  # fmt: skip


@given(st.text())
def test_any_reply_is_in_range_or_nothing(reply: str) -> None:
    score = parse_score(reply)
    assert score is None or 0 <= score <= 10


def arguments(server: JudgeServer, work_dir: Path) -> list[str]:
    return [
        "score", "pathvqa",
        "--data-path", str(goldens.GOLDEN / "eval" / "mixed_gt.json"),
        "--answers", str(goldens.GOLDEN / "eval" / "mixed_pred.json"),
        "--work-dir", str(work_dir), "--tokenizer", str(goldens.TINY_LLAMA),
    ]  # fmt: skip


def test_the_command_scores_and_judges(server: JudgeServer, tmp_path: Path) -> None:
    whom = ["--judge", server.url, "--judge-model", "judge"]
    result = CliRunner().invoke(cli.main, [*arguments(server, tmp_path), *whom])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["judged"]["similarity"]["value"] == 50
    assert metrics["published"]["exact"]["overall"] == 66.67
    assert metrics["published"]["token recall"]["overall"] == 80.56
    assert "Judged similarity" in result.output
    asked = sum(server.requests.values())
    CliRunner().invoke(cli.main, [*arguments(server, tmp_path), *whom])
    assert sum(server.requests.values()) == asked


def test_the_command_says_what_the_judge_left_out(server: JudgeServer, tmp_path: Path) -> None:
    whom = ["--judge", server.url, "--judge-model", "judge", "--judge-price-in", "1000"]
    result = CliRunner().invoke(
        cli.main, [*arguments(server, tmp_path), *whom, "--max-cost", "0.0001"]
    )
    assert result.exit_code == 3, result.output
    assert "run the command again" in result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["judged"]["not asked"] == 9


def test_the_command_needs_no_judge(server: JudgeServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, [*arguments(server, tmp_path), "--compat", "original"])
    assert result.exit_code == 0, result.output
    assert not server.requests
    result = CliRunner().invoke(cli.main, [*arguments(server, tmp_path), "--judge", server.url])
    assert result.exit_code == 2

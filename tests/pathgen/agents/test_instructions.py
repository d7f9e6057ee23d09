"""Instruction data: correct format, drawn evenly and reproducibly, readable by training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pathcore.chat_backends import OpenAIBackend
from pathgen.agents.instructions import KINDS, make_instructions
from pathgen.agents.steps import StepReport, run_step
from tests.pathgen.conftest import patch_rows, read_rows, write_rows
from tests.pathgen.describer_server import WORDS, DescriberServer

CHOICES = ["Necrosis", "Fibrosis", "Oedema", "Amyloid"]
REPLIES = {
    "student and a teacher": {
        "turns": [
            {"question": "Which tissue is it?", "answer": "Glandular tissue."},
            {"question": "What process is it?", "answer": "An adenocarcinoma."},
        ]
    },
    "short answers": {"pairs": [{"question": "What fills the lumen?", "answer": "Necrosis"}]},
    "choices to answer": {
        "pairs": [
            {"question": "Is there necrosis?", "choices": ["Yes", "No"], "answer": "Yes"},
            {"question": "What is central?", "choices": CHOICES, "answer": "Necrosis"},
        ]
    },
}


def write(text: str) -> str:
    for mark, reply in REPLIES.items():
        if mark in text:
            return json.dumps(reply)
    return WORDS


def make(
    server: DescriberServer, folder: Path, count: int, **settings: Any
) -> tuple[StepReport, list[dict[str, Any]]]:
    rows = patch_rows(*[f"case {number}" for number in range(count)])
    source = write_rows(folder / "captions.jsonl", rows)
    out = folder / "conversations.jsonl"
    step = make_instructions(**settings)
    backend = OpenAIBackend(server.url, "m", concurrency=4)
    report = run_step(step, backend, source, out, images=folder, progress=False)
    return report, read_rows(out)


def test_every_kind_in_the_llava_schema(server: DescriberServer, tmp_path: Path) -> None:
    server.write = write
    report, rows = make(server, tmp_path, 40, every_kind=True)
    assert report.complete
    assert len({row["id"] for row in rows}) == len(rows) == 40 * len(KINDS)
    for row in rows:
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        marks = [turn["value"].count("<image>") for turn in row["conversations"]]
        assert marks == [1] + [0] * (len(marks) - 1)
        assert row["conversations"][0]["value"].startswith("<image>\n")
    closed = [row["conversations"] for row in rows if row["kind"] == "closed"]
    answers = Counter(turns[3]["value"] for turns in closed)
    assert set(answers) == {f"{letter}. Necrosis" for letter in "ABCD"}, "every letter is drawn"
    for turns in closed:
        assert turns[1]["value"] == "Yes"
        assert turns[3]["value"] in turns[2]["value"].split("\n")
    questions = {row["conversations"][0]["value"] for row in rows if row["kind"] == "detail"}
    assert len(questions) > 3


def test_shares_are_kept_and_drawn_by_id(server: DescriberServer, tmp_path: Path) -> None:
    server.write = write
    weights = {"conversation": 3.0, "open": 1.0, "detail": 0.0}
    _, rows = make(server, tmp_path, 120, weights=weights)
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"conversation", "open"}
    assert 70 <= kinds["conversation"] <= 110
    _, again = make(server, tmp_path, 60, weights=weights)
    assert again == rows[:60]


@pytest.mark.parametrize(
    "reply",
    [
        {"pairs": [{"question": "Is there one?", "choices": ["Yes", "No"], "answer": "Maybe"}]},
        {"pairs": [{"question": "Is there one?", "choices": ["Yes"], "answer": "Yes"}]},
        {"pairs": [{"question": "Is <image> one?", "choices": ["Yes", "No"], "answer": "No"}]},
        {"pairs": [{"question": "According to the caption, is it?", "choices": ["Yes", "No"],
                    "answer": "No"}]},
        {"pairs": []},
    ],
)  # fmt: skip
def test_wrong_questions_are_not_taken(
    server: DescriberServer, tmp_path: Path, reply: dict[str, Any]
) -> None:
    server.write = lambda _: json.dumps(reply)
    report, rows = make(server, tmp_path, 1, weights={"closed": 1.0})
    assert not rows
    assert report.counts["failed"] == 1


def test_letters_of_the_model_are_not_shuffled_along(
    server: DescriberServer, tmp_path: Path
) -> None:
    labelled = [f"{letter}. {choice}" for letter, choice in zip("ABCD", CHOICES, strict=True)]
    pairs = [
        {"question": "What is central?", "choices": labelled, "answer": "A. Necrosis"},
        {"question": "Is it seen?", "choices": ["(A) Yes", "(B) No"], "answer": "(B) No"},
        {"question": "Which one is it?", "choices": ["E. coli", "B. cereus"], "answer": "E. coli"},
    ]
    server.write = lambda _: json.dumps({"pairs": pairs})
    _, (row,) = make(server, tmp_path, 1, weights={"closed": 1.0})
    said = [turn["value"] for turn in row["conversations"]]
    letter, _, choice = said[1].partition(". ")
    assert choice == "Necrosis" and f"\n{letter}. Necrosis\n" in said[0]
    assert [line[:3] for line in said[0].splitlines()[2:6]] == ["A. ", "B. ", "C. ", "D. "]
    assert not any(line[3:5] in ("A.", "B.", "C.", "D.") for line in said[0].splitlines())
    assert said[2:4] == ["Is it seen? Answer yes or no.", "No"]
    assert said[5].endswith(". E. coli")


def test_training_takes_the_rows(server: DescriberServer, tmp_path: Path) -> None:
    from pallava.text.encoding import check_row

    server.write = write
    _, rows = make(server, tmp_path, 3, every_kind=True)
    assert [check_row(row) for row in rows] == [None] * 12


def test_wrong_weights_are_refused() -> None:
    for weights in ({"song": 1.0}, {"open": -1.0}, {"open": 0.0}):
        with pytest.raises(ValueError, match="weights for some of"):
            make_instructions(weights)

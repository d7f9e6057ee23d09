"""Answers of quantised models are compared question by question."""

from __future__ import annotations

from benchmarks.quantised import FULL, compare, table
from xtuner_add.demo.pallava import wording


def test_differences_are_paired() -> None:
    closed = next(iter(wording.CLOSED))
    rows = [
        {"image": "a.png", "kind": closed, "answer": "yes"},
        {"image": "a.png", "kind": closed, "answer": "no"},
        {"image": "b.png", "kind": closed, "answer": "no"},
        {"image": "b.png", "kind": "open", "answer": "stroma"},
    ]
    full = {0: "yes", 1: "Yes", 2: "no ", 3: "stroma"}
    answers = {FULL: full, "4 bits": {0: "no", 1: "no", 2: "no ", 3: "fat"}}
    whole, small = compare(rows, answers)
    assert whole["closed"][0] == small["closed"][0] == 2 / 3
    assert whole["same"] == [1, 1, 1] and small["same"][0] == 0.25
    assert small["closed_difference"][0] == 0  # one lost and one gained
    assert small["open_difference"] == [-1, -1, -1]
    assert "| 4 bits" in table([small], {"4 bits": 12.0})

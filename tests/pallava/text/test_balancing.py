"""Answers to one wording weigh equally in sum, and open questions keep their weight."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from pallava.text.balancing import answer_weights

Row = list[dict[str, str]]


def pair(question: str, answer: str) -> dict[str, str]:
    return {"input": question, "output": answer}


def sums(rows: list[Row], weights: list[list[float]]) -> dict[str, dict[str, float]]:
    """Sum of the weights by question and answer."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row, row_weights in zip(rows, weights, strict=True):
        for turn, weight in zip(row, row_weights, strict=True):
            found[turn["input"]][turn["output"]] += weight  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def test_answers_to_each_wording_count_equally_in_sum() -> None:
    rows = [
        [
            pair("Is mucin shown?", "yes" if number % 5 else "no"),
            pair("Name the organ.", f"organ {number}"),
            pair("Is fat shown?", "no" if number % 3 else "yes"),
        ]
        for number in range(60)
    ]
    found = sums(rows, answer_weights(rows))
    assert found["Is mucin shown?"] == pytest.approx({"yes": 30, "no": 30})
    assert found["Is fat shown?"] == pytest.approx({"yes": 30, "no": 30})
    assert set(found["Name the organ."].values()) == {1.0}  # an open question


def test_wordings_and_answers_are_compared_as_the_audit_compares_them() -> None:
    rows = [[pair("<image>\nIs mucin shown?", "Yes.")]] * 8
    rows += [[pair("is the mucin shown", "yes")]] * 8 + [[pair("Is mucin shown?", "No")]] * 4
    weights = [row[0] for row in answer_weights(rows)]
    assert weights == pytest.approx([0.625] * 16 + [2.5] * 4)


def test_a_single_rare_answer_weighs_ten_times_as_much_at_most() -> None:
    rows = [[pair("Is it?", "yes")]] * 99 + [[pair("Is it?", "no")]]
    weights = [row[0] for row in answer_weights(rows)]
    assert weights[-1] / weights[0] == pytest.approx(10)
    assert sum(weights) == pytest.approx(100)


def test_what_is_asked_seldom_or_always_answered_alike_keeps_its_weight() -> None:
    rows = [[pair("Is it?", "yes" if number else "no")] for number in range(19)]
    rows += [[pair("Is the image stained?", "yes")]] * 40
    assert {weight for row in answer_weights(rows) for weight in row} == {1.0}

"""Rows of rare answers are repeated until a wording no longer tells its answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pallava.text.balancing import balance_answers


def row(number: int, *pairs: tuple[str, str]) -> dict[str, Any]:
    turns = [
        {"from": speaker, "value": text}
        for pair in pairs
        for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": str(number), "image": [f"{number}.png"], "conversations": turns}


def answers(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for one in rows:
        turns = [turn["value"] for turn in one["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            found.setdefault(question.removeprefix("<image>\n"), Counter())[answer] += 1
    return found


def test_answers_to_each_wording_become_equally_frequent() -> None:
    rows = [
        row(
            number,
            ("Is mucin shown?", "yes" if number % 5 else "no"),
            ("Name the organ.", f"organ {number}"),
            ("Is fat shown?", "no" if number % 3 else "yes"),
        )
        for number in range(60)
    ]
    balanced = balance_answers(rows)
    assert balanced[:60] == rows
    found = answers(balanced)
    assert found["Is mucin shown?"] == {"yes": 48, "no": 48}
    assert found["Is fat shown?"] == {"no": 40, "yes": 40}
    assert set(found["Name the organ."].values()) == {1}  # an open question
    for added in balanced[60:]:
        number = int(added["id"].split()[0])
        assert added["image"] == [f"{number}.png"]
        first, *others = [turn["value"] for turn in added["conversations"][::2]]
        assert first.startswith("<image>\n")
        assert not any("<image>" in text for text in others)
        # What an image's row says stays true, and no question is asked twice in a conversation.
        assert answers([added]).items() <= answers([rows[number]]).items()
    assert len({added["id"] for added in balanced}) == len(balanced)
    assert balance_answers(rows) == balanced


def test_few_answers_are_not_repeated_without_end() -> None:
    rows = [row(number, ("Is it?", "no" if number == 0 else "yes")) for number in range(100)]
    assert answers(balance_answers(rows))["Is it?"] == {"yes": 99, "no": 10}
    assert balance_answers(rows[:19]) == rows[:19]  # asked too seldom


@pytest.mark.parametrize("second", ["<image>\nIs it?", "Is it?"])
def test_rows_with_images_in_later_turns_are_left_alone(second: str) -> None:
    rows = [
        row(number, ("Describe.", f"text {number}"), (second, "yes" if number else "no"))
        for number in range(20)
    ]
    added = balance_answers(rows)[20:]
    assert len(added) == (0 if "<image>" in second else 9)

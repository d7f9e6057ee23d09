"""Marks tell wordings and answers apart, and open questions have none."""

from __future__ import annotations

from pallava.text.contrasts import ANSWER_BITS, answer_marks


def pair(question: str, answer: str) -> dict[str, str]:
    return {"input": question, "output": answer}


def test_marks_agree_exactly_where_wording_and_answer_do() -> None:
    rows = [
        [
            pair("<image>\nIs mucin shown?", ("Yes.", "yes")[number % 2] if number % 5 else "no"),
            pair("is the mucin shown", "No" if number % 3 else "yes"),
            pair("Is fat shown?", "no" if number % 3 else "yes"),
            pair("Name the organ.", f"organ {number}"),
        ]
        for number in range(60)
    ]
    marks = answer_marks(rows)
    # Articles, case and stops are no differences, as in the audit.
    assert {row[0] for row in marks} == {row[1] for row in marks}
    assert len({row[0] for row in marks}) == len({row[2] for row in marks}) == 2
    mucin, fat = ({row[place] >> ANSWER_BITS for row in marks} for place in (0, 2))
    assert len(mucin) == len(fat) == 1
    assert mucin != fat
    assert {row[3] for row in marks} == {0}  # an open question
    assert 0 not in {mark for row in marks for mark in row[:3]}


def test_marks_of_several_data_sets_agree() -> None:
    one = [[pair("Is it?", "yes" if number % 2 else "no")] for number in range(20)]
    other = [[pair("Is that?", "no")], *([pair("Is it?", "no")], [pair("Is it?", "yes")]) * 10]
    assert answer_marks(one)[:2] == answer_marks(other)[1:3]
    assert answer_marks(other)[0] == [0]


def test_what_is_asked_seldom_or_always_answered_alike_has_no_mark() -> None:
    rows = [[pair("Is it?", "yes" if number else "no")] for number in range(19)]
    rows += [[pair("Is the image stained?", "yes")]] * 40
    assert {mark for row in answer_marks(rows) for mark in row} == {0}

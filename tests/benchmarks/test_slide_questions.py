"""Answers to questions about slides are scored correctly."""

from __future__ import annotations

import numpy as np

from benchmarks.slide_questions import share_interval, summarise, table
from xtuner_add.demo.pallava.answers import exchanged_images


def test_scores() -> None:
    rows = [
        {"slide": f"s{i}", "kind": "which", "question": "Is there fat?", "answer": answer}
        for i, answer in enumerate(["yes", "yes", "yes", "no"])
    ]
    for row, block in zip(rows, ["0-1", "0-1", "4-0", "4-0"], strict=True):
        row["block"] = block
    exchanged = exchanged_images(rows, np.random.default_rng(0), "slide")
    assert sorted(exchanged) == [row["slide"] for row in rows]
    assert all(slide != row["slide"] for slide, row in zip(exchanged, rows, strict=True))
    for row, given in zip(rows, ["Yes", "yes ", "no", "no"], strict=True):
        row |= {"itself": given, "exchanged": "no", "displaced": row["answer"]}
    found = summarise(rows)["which"]
    assert (found["questions"], found["majority"]) == (4, 0.75)
    assert [found[way][0] for way in ("itself", "exchanged", "displaced")] == [0.75, 0.25, 1.0]
    # Of two blocks, draws have the right ones, the half right ones, or one of each.
    assert found["itself"][1:] == (0.5, 1.0)
    assert share_interval(rows, [True, True, False, False]) == (0.5, 0.0, 1.0)
    assert "| which | 4 | 0.750 (0.500 to 1.000) |" in table({"which": found})

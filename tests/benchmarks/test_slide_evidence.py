"""Deletion and insertion of an answer whose tiles are known, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.slide_evidence import SHARES, asked_kinds, curves, group, table
from benchmarks.slide_map import FAT, NECROSIS, TUMOUR


class Answer:
    """An answer that changes once three of the first ten of a hundred tiles are missing."""

    bag = SimpleNamespace(features=torch.zeros(100, 2))

    def keep(self, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        same = torch.tensor([bool(mask[:10].sum() > 7) for mask in masks])
        return same.float(), same


def test_curves_of_an_answer_that_depends_on_ten_tiles() -> None:
    answer: Any = Answer()
    found = curves(answer, -torch.arange(100.0))
    assert found["deletion"] == [share >= 0.03 for share in SHARES]
    assert found["insertion"] == [share >= 0.08 for share in SHARES]
    worst = curves(answer, torch.arange(100.0))
    assert not any(worst["deletion"]) and not any(worst["insertion"])


def test_table() -> None:
    row = {"kind": "which", "question": "Does the slide show fat?", "answer": "yes", "of": 100}
    row["block"] = "0-1"
    told = {"cited": 4, "told": True, "trials": 20, "random_changes": 1}
    told |= {"of_the_kind": 0.75, "share_of_the_kind": 0.1}
    rows = [{**row, **told}, {**row, **told, "cited": 0, "told": False, "trials": 0}]
    line = table(rows).splitlines()[-1]
    assert line.startswith("| which: yes | 2 | 0.50 (0.50 to 0.50) | 0.050 (0.050 to 0.050) | ")
    assert line.endswith("| 4.0% | 0.75 (0.10) |")


@pytest.mark.parametrize(
    ("kind", "question", "tissue", "name"),
    [
        ("which", "Does the slide show fat?", [FAT], "which: yes"),
        ("how much", "How much of the tissue is tumour?", [TUMOUR], "how much: yes"),
        ("where", "In which quarter is the fat?", [FAT], "where"),
        ("touches", "Does tumour touch necrosis?", [TUMOUR, NECROSIS], "touches: yes"),
        ("which side", "On which side of the fat is the tumour?", [TUMOUR, FAT], "which side"),
    ],
)
def test_what_a_question_is_about(kind: str, question: str, tissue: list[int], name: str) -> None:
    row = {"kind": kind, "question": question, "answer": "yes"}
    assert (asked_kinds(row), group(row)) == (tissue, name)

"""The synthetic slides match their answers, and answers are scored correctly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.slide_cohort import AMOUNTS, IN_FEATURES, NECROSIS, TUMOUR, Cohort
from benchmarks.slide_questions import make_data, share_interval, summarise, table
from pallava.slide_bags import read_bag
from xtuner_add.demo.pallava.answers import exchanged_images


@pytest.mark.parametrize("number", range(40))
def test_a_slide_is_what_its_answers_say(number: int) -> None:
    answers, kinds, _ = Cohort(3).slide(0, number)
    tissue = kinds >= 0
    assert {kind for kind in range(2, 6) if (kinds == kind).any()} == answers.present
    tumour = np.argwhere(kinds == TUMOUR)
    low, high = AMOUNTS[answers.amount]
    assert low - 0.01 < len(tumour) / tissue.sum() < high + 0.01
    # By its definition: a tile at the margin has glass, or the end of the grid, among its eight.
    padded = np.pad(tissue, 1)
    at_margin = any(not padded[y : y + 3, x : x + 3].all() for y, x in tumour)
    assert at_margin == answers.at_margin
    if NECROSIS in answers.present:
        necrosis = np.argwhere(kinds == NECROSIS)
        steps = np.abs(tumour[:, None] - necrosis[None]).max(axis=-1).min()
        assert (steps == 1) if answers.touches else (steps > 3)
        offset = necrosis.mean(axis=0) - np.argwhere(tissue).mean(axis=0)
        up, left = (offset < 0).tolist()
        assert answers.quarter == f"{'upper' if up else 'lower'} {'left' if left else 'right'}"


def test_files_hold_the_slides(tmp_path: Path) -> None:
    make_data(tmp_path, seed=3, num_train=3, num_held_out=2)
    for part, name in ((0, "train_00002"), (1, "held_out_00001")):
        _, kinds, _ = Cohort(3).slide(part, int(name[-5:]))
        bag = read_bag(tmp_path / "features" / f"{name}.h5", in_features=IN_FEATURES)
        assert len(bag.features) == (kinds >= 0).sum()
        rows, columns = np.nonzero(kinds >= 0)
        places = bag.positions.numpy() - bag.positions.numpy().min(axis=0)
        np.testing.assert_array_equal(places, np.stack([columns, rows], axis=1) - [0, 0])
    assert len((tmp_path / "conversations.jsonl").read_text().splitlines()) == 3


def test_scores() -> None:
    rows = [
        {"slide": f"s{i}", "kind": "which", "question": "Is there fat?", "answer": answer}
        for i, answer in enumerate(["yes", "yes", "yes", "no"])
    ]
    exchanged = exchanged_images(rows, np.random.default_rng(0), "slide")
    assert sorted(exchanged) == [row["slide"] for row in rows]
    assert all(slide != row["slide"] for slide, row in zip(exchanged, rows, strict=True))
    for row, given in zip(rows, ["Yes", "yes ", "no", "no"], strict=True):
        row |= {"itself": given, "exchanged": "no", "displaced": row["answer"]}
    found = summarise(rows)["which"]
    assert (found["questions"], found["majority"]) == (4, 0.75)
    assert [found[way][0] for way in ("itself", "exchanged", "displaced")] == [0.75, 0.25, 1.0]
    # Wilson 1927: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    assert found["itself"][1:] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    # Two of one block are right together, or wrong: of its draws, all, none or half are right.
    blocks = [{**row, "block": row["answer"]} for row in rows]
    assert share_interval(blocks, [True, True, True, False]) == (0.75, 0.0, 1.0)
    assert "| which | 4 | 0.750 (0.301 to 0.954) |" in table({"which": found})

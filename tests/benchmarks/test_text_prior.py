"""The questions of the benchmark have the prior that it states, and its figures are right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.text_prior import MODES, make_data, summarise, table
from pathcore.rows import write_rows
from xtuner_add.demo.pallava.dataset import plan_slides
from xtuner_add.demo.stages import read_jsonl


def test_the_text_alone_answers_four_fifths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plans = [
        {
            "id": f"{part}_{number}",
            "part": part,
            "tissues": plan.tissues,
            "vesicular": plan.vesicular,
        }
        for part in ("train", "held_out")
        for number, plan in enumerate(plan_slides(200, part, rng))
    ]
    write_rows(tmp_path / "data" / "plans.jsonl", plans)
    make_data(tmp_path, tmp_path, seed=1)
    held_out: dict[str, Counter[str]] = {}
    for row in read_jsonl(tmp_path / "held_out.jsonl"):
        held_out.setdefault(row["question"], Counter())[row["answer"]] += 1
    train: dict[str, Counter[str]] = {}
    for row in read_jsonl(tmp_path / "conversations.jsonl"):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            train.setdefault(question, Counter())[answer] += 1
    assert len(train) == len(held_out) == 8
    for question, counts in train.items():
        assert max(counts.values()) == 4 * min(counts.values()) > 0
        assert counts.most_common(1)[0][0] == held_out[question].most_common(1)[0][0]
        assert max(held_out[question].values()) == 4 * min(held_out[question].values())
    assert {counts.most_common(1)[0][0] for counts in train.values()} == {"yes", "no"}


def test_figures_are_paired_over_seeds() -> None:
    right = {"plain": {"true": 1, "exchanged": 1, "none": 1},
             "contrasted": {"true": 1, "exchanged": 0, "none": 1}}  # fmt: skip
    rows = {
        f"{mode}_{seed}": [
            {"item": str(item), "arm": arm, "cluster": str(item), "correct": float(value),
             "image alone": float(arm == "true" or item < 3), "text alone": float(item > 0)}
            for arm, value in right[mode].items()
            for item in range(4)
        ]
        for mode in MODES
        for seed in range(3)
    }  # fmt: skip
    rows["contrasted_2"][0]["correct"] = 0.0
    found = summarise(rows)
    assert found["seeds"] == ["0", "1", "2"]
    assert found["true"]["contrasted - plain"][0] == pytest.approx(-1 / 12, abs=1e-4)
    assert found["true"]["by seed"] == {"plain": [1, 1, 1], "contrasted": [1, 1, 0.75]}
    assert found["true"]["text alone"][0] == 0.75
    assert found["rare"]["contrasted"][0] == pytest.approx(2 / 3, abs=1e-4)  # item 0 of each seed
    assert found["exchanged"]["contrasted - plain"] == [-1, -1, -1]
    assert found["exchanged"]["contrasted - image alone"][0] == -0.75
    assert "| exchanged images | 1.000 (1.000 to 1.000) | 0.000" in table(found)
    json.dumps(found)

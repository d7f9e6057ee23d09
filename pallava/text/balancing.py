"""Balances the answers to each wording, so that a text alone no longer tells its answer.

If nine of ten training answers to "Is there necrosis?" are yes, a model lowers its loss by learning
that prior, and the image has little left to explain (Goyal et al. 2017, arXiv:1612.00837, balanced
VQA for this reason). Rows of the rarer answers are repeated until all answers are equally frequent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pallava.text.encoding import IMAGE_TOKEN
from pallava.text.words import words

_MIN_ASKED = 20
"""Wordings asked less often are left alone: their answers tell of single images."""

_MAX_ANSWERS = 10
"""Wordings with more answers than this are open questions."""

_MAX_REPEATS = 10
"""No answer is learned more often than this, so that a handful of rows is not learned by heart."""

Row = dict[str, Any]


def balance_answers(rows: Sequence[Row], *, seed: int = 0) -> list[Row]:
    r"""Adds rows that repeat the rarer answers of each wording.

    The given rows stay as they are. An added row holds the questions of one given row whose answers
    are too rare, as a conversation of its own about the same image. Only questions that are asked
    at least 20 times, with 2 to 10 different answers, are balanced, and an answer is repeated ten
    times at most.

    Args:
        rows: Rows with `id`, `image` and `conversations`, as `process_text` reads them. Rows whose
            image tokens are not all in the first question are not repeated.
        seed: Seed of the choice of the rows that are repeated once more than others.

    Returns:
        The given rows, followed by the added ones.

    Example:
        >>> question = {"from": "human", "value": "<image>\nMucin?"}
        >>> turns = [[question, {"from": "gpt", "value": a}] for a in ["yes"] * 16 + ["no"] * 4]
        >>> rows = [{"id": str(i), "image": None, "conversations": t} for i, t in enumerate(turns)]
        >>> Counter(row["conversations"][1]["value"] for row in balance_answers(rows))
        Counter({'yes': 16, 'no': 16})
    """
    asked: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows):
        for turn, (question, answer) in enumerate(_pairs(row)):
            wording = " ".join(words(question.replace(IMAGE_TOKEN, " ")))
            asked[wording][" ".join(words(answer))].append((number, turn))
    rng = np.random.default_rng(seed)
    extra: dict[int, Counter[int]] = defaultdict(Counter)  # by row, then by turn
    for answers in asked.values():
        counts = [len(places) for places in answers.values()]
        if sum(counts) < _MIN_ASKED or not 2 <= len(counts) <= _MAX_ANSWERS:
            continue
        for places in answers.values():
            wanted = min(max(counts), _MAX_REPEATS * len(places)) - len(places)
            order = rng.permutation(len(places))
            for copy in range(wanted):
                number, turn = places[order[copy % len(places)]]
                extra[number][turn] += 1
    added = []
    for number, repeats in extra.items():
        row, pairs = rows[number], _pairs(rows[number])
        if any(IMAGE_TOKEN in question for question, _ in pairs[1:]):
            continue
        marks = pairs[0][0].count(IMAGE_TOKEN) * f"{IMAGE_TOKEN}\n"
        for copy in range(max(repeats.values())):
            kept = [pairs[turn] for turn in sorted(repeats) if repeats[turn] > copy]
            conversation = []
            for place, (question, answer) in enumerate(kept):
                text = question.replace(IMAGE_TOKEN, "").strip()
                value = text if place else f"{marks}{text}"
                conversation.append({"from": "human", "value": value})
                conversation.append({"from": "gpt", "value": answer})
            identity = f"{row['id']} [balanced {copy + 1}]"
            added.append({**row, "id": identity, "conversations": conversation})
    return [*rows, *added]


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns questions with their answers; turns without a partner are left out."""
    turns = row["conversations"]
    return [
        (human["value"], gpt["value"])
        for human, gpt in pairwise(turns)
        if human["from"] == "human" and gpt["from"] == "gpt"
    ]

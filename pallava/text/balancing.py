"""Weighs answers so that a text alone does not tell its answer.

If four of five training answers to "Is there necrosis?" are yes, a model lowers its loss by
learning that prior, and the image has less left to explain (Goyal et al. 2017, arXiv:1612.00837,
collected balanced pairs for this reason). The weights make all answers to one wording count equally
in sum.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN
from pallava.text.words import words

_MIN_ASKED = 20
"""Wordings asked less often keep weights of 1: their answers tell of single images."""

_MAX_ANSWERS = 10
"""Wordings with more answers than this are open questions."""

_MAX_RATIO = 10.0
"""Bounds the weight of a rare answer relative to the most frequent one, and with it the variance of
the gradient."""


def answer_weights(conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[list[float]]:
    """Computes the weight of every answer in the loss, inverse to its frequency.

    Wordings are compared as the audit compares them (`pallava.evaluation.audit`). The weights of a
    wording have a mean of 1. Only questions that are asked at least 20 times, with 2 to 10
    different answers, are weighed, and no answer weighs more than ten times as much as another.

    Args:
        conversations: Question-answer pairs `input` and `output` of every row.

    Returns:
        One weight per pair of every row.

    Example:
        >>> answers = ["yes"] * 16 + ["no"] * 4
        >>> rows = [[{"input": "<image>Mucin?", "output": answer}] for answer in answers]
        >>> weights = answer_weights(rows)
        >>> weights[0], weights[-1]
        ([0.625], [2.5])
    """
    keys = [[(_key(pair["input"]), _key(pair["output"])) for pair in row] for row in conversations]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in keys:
        for wording, answer in row:
            counts[wording][answer] += 1
    weights = {wording: _weights(answers) for wording, answers in counts.items()}
    return [[weights[wording].get(answer, 1.0) for wording, answer in row] for row in keys]


def spread_weights(labels: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Gives every label the weight of its answer.

    Args:
        labels: Labels of a conversation, possibly truncated; an answer is a run of labels that are
            not ignored, since a question lies between any two.
        weights: One weight per answer.

    Example:
        >>> spread_weights([-100, 5, 6, -100, 7], [0.5, 2.0])
        [1.0, 0.5, 0.5, 1.0, 2.0]
    """
    spread, number, inside = [], -1, False
    for label in labels:
        number += label != IGNORE_INDEX and not inside
        inside = label != IGNORE_INDEX
        spread.append(weights[number] if inside else 1.0)
    return spread


def _key(text: str) -> str:
    return " ".join(words(text.replace(IMAGE_TOKEN, " ")))


def _weights(counts: Counter[str]) -> dict[str, float]:
    total, highest = counts.total(), max(counts.values())
    if total < _MIN_ASKED or not 2 <= len(counts) <= _MAX_ANSWERS:
        return {}
    relative = {answer: min(highest / count, _MAX_RATIO) for answer, count in counts.items()}
    mean = sum(relative[answer] * count for answer, count in counts.items()) / total
    return {answer: value / mean for answer, value in relative.items()}

"""Marks answers that a loss can contrast, so that the image and not the text separates them.

If four of five training answers to "Is there necrosis?" are yes, a model lowers its loss by
learning that prior, which leaves less for the image to explain (Goyal et al. 2017,
arXiv:1612.00837, collected balanced pairs for this reason). The prior cannot tell apart two images
with the same question and different answers, because it favours the same answer for both.
`pallava.modeling.contrast` has the loss.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN
from pallava.text.words import words

ANSWER_BITS = 20
"""A mark holds a hash of the answer in its lowest bits and one of the wording in those above, so
that the marks of several data sets agree."""

_WORDING_BITS = 40

_MIN_ASKED = 20
"""Wordings asked less often are not contrasted: a batch would rarely contain two of them."""

_MAX_ANSWERS = 10
"""Wordings with more answers than this are open questions."""


def answer_marks(conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int]]:
    """Computes the mark of every answer, which identifies its wording and the answer.

    Wordings and answers are compared as in the audit (`pallava.evaluation.audit`). Only questions
    that are asked at least 20 times, with 2 to 10 different answers, are contrasted.

    Args:
        conversations: Question-answer pairs `input` and `output` of every row.

    Returns:
        One mark per pair of every row; 0 for an answer that is not contrasted.

    Example:
        >>> rows = [[{"input": "<image>Mucin?", "output": "no" if i % 5 else "Yes."}]
        ...         for i in range(20)]
        >>> marks = [row[0] for row in answer_marks(rows)]
        >>> len(set(marks)), len({mark >> ANSWER_BITS for mark in marks})
        (2, 1)
    """
    keys = [[(_key(pair["input"]), _key(pair["output"])) for pair in row] for row in conversations]
    asked: dict[str, int] = defaultdict(int)
    answers: dict[str, set[str]] = defaultdict(set)
    for row in keys:
        for wording, answer in row:
            asked[wording] += 1
            answers[wording].add(answer)
    marks = {
        (wording, answer): _hash(wording, _WORDING_BITS) << ANSWER_BITS | _hash(answer, ANSWER_BITS)
        for wording, found in answers.items()
        if asked[wording] >= _MIN_ASKED and 2 <= len(found) <= _MAX_ANSWERS
        for answer in found
    }
    return [[marks.get(key, 0) for key in row] for row in keys]


def spread_marks(labels: Sequence[int], marks: Sequence[int]) -> list[int]:
    """Spreads marks over labels: the first label of an answer gets its mark, all others 0.

    Args:
        labels: Labels of a conversation, possibly truncated; an answer is a run of labels that are
            not ignored, since a question lies between any two.
        marks: One mark per answer.

    Example:
        >>> spread_marks([-100, 5, 6, -100, 7], [16, 33])
        [0, 16, 0, 0, 33]
    """
    before = [IGNORE_INDEX, *labels]
    starts = [
        label != IGNORE_INDEX and previous == IGNORE_INDEX
        for previous, label in zip(before, labels, strict=False)
    ]
    rest = iter(marks)
    return [next(rest) if start else 0 for start in starts]


def _key(text: str) -> str:
    return " ".join(words(text.replace(IMAGE_TOKEN, " ")))


def _hash(text: str, bits: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 64 - bits

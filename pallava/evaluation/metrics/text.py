"""Text metrics: normalisation, exact match, token precision, recall and F1, BLEU, yes/no.

Tokens are words. The definitions follow SQuAD (arXiv:1606.05250, its evaluation script): case,
punctuation and articles are ignored, and tokens are compared as multisets. All scores, including
BLEU, lie between 0 and 1.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pallava.evaluation.metrics.replies import answer_part, plain
from pallava.text.words import words

_NEGATIONS = {"no", "not", "none", "cannot", "without"}


class TokenScores(NamedTuple):
    """Word overlap of an answer and its reference."""

    precision: float
    recall: float
    f1: float


def exact_match(answer: str, reference: str) -> bool:
    """Returns whether two texts consist of the same words in the same order.

    Texts without words, such as "A" (an article) and "+", are compared literally.
    """
    found, expected = words(answer), words(reference)
    if not found and not expected:
        return _plain(answer) == _plain(reference)
    return found == expected


def token_scores(answer: str, reference: str) -> TokenScores:
    """Returns precision, recall and F1 over words as multisets.

    Example:
        >>> token_scores("chronic inflammation", "acute inflammation").f1
        0.5
    """
    found, expected = words(answer), words(reference)
    if not found or not expected:
        both = float(exact_match(answer, reference))
        return TokenScores(both, both, both)
    common = (Counter(found) & Counter(expected)).total()
    if not common:
        return TokenScores(0.0, 0.0, 0.0)
    precision, recall = common / len(found), common / len(expected)
    return TokenScores(precision, recall, 2 * precision * recall / (precision + recall))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def corpus_bleu(
    answers: Sequence[str], references: Sequence[str], max_ngram_order: int = 4
) -> float:
    """Computes corpus BLEU of normalised words (Papineni et al. 2002, doi:10.3115/1073083.1073135).

    Uses sacrebleu without smoothing. Answers are split by `words`, so that case and punctuation are
    ignored as in the other metrics.

    Raises:
        ValueError: If answers and references differ in number or are empty.
    """
    from sacrebleu.metrics import BLEU

    if len(answers) != len(references) or not answers:
        raise ValueError(
            f"BLEU: expected as many answers as references, at least one; got {len(answers)} and "
            f"{len(references)}"
        )
    metric = BLEU(tokenize="none", max_ngram_order=max_ngram_order, smooth_method="none")
    hypotheses = [" ".join(words(answer)) for answer in answers]
    expected = [" ".join(words(reference)) for reference in references]
    return float(metric.corpus_score(hypotheses, [expected]).score) / 100


def parse_yes_no(answer: str) -> str | None:
    """Reads `yes` or `no` from an answer; None if it contains neither or both, or does not know.

    The first word after any reasoning decides; otherwise the answer must contain exactly one of the
    two. "No idea" is not a no.

    Example:
        >>> parse_yes_no("No, yes would be wrong."), parse_yes_no("The answer is yes.")
        ('no', 'yes')
    """
    found = words(plain(answer_part(answer)))
    if ("no", "idea") in pairwise(found):
        return None
    if found and found[0] in ("yes", "no"):
        return found[0]
    said = {word for word in found if word in ("yes", "no")}
    if len(said) != 1:
        return None
    (only,) = said
    # Negated forms such as "It is not a yes" are ambiguous.
    if only == "yes" and _NEGATIONS & set(found):
        return None
    return only

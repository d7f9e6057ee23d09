"""Classification metrics: accuracy, balanced accuracy, precision, recall, F1, confusion matrix.

Shapes: K classes. A confusion matrix is `(K, K + 1)`: rows are true classes, columns predicted
classes, and the last column counts answers that name no class, which are wrong in every metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pallava.evaluation.metrics.choices import contains
from pallava.evaluation.metrics.replies import answer_part, plain
from pallava.text.words import words

Counts = NDArray[np.int64]

_NEGATIONS = {"no", "not", "without", "rather", "instead"}


def confusion_matrix(
    true: Sequence[str], predicted: Sequence[str | None], classes: Sequence[str]
) -> Counts:
    """Counts pairs of true and predicted class.

    Returns:
        `(K, K + 1)` counts.

    Raises:
        ValueError: If the sequences differ in length or are empty, or a true label is not a class.

    Example:
        >>> confusion_matrix(["a", "b", "b"], ["a", "a", None], ["a", "b"]).tolist()
        [[1, 0, 0], [1, 0, 1]]
    """
    if len(true) != len(predicted) or not true:
        raise ValueError(
            f"expected as many predictions as labels, at least one; got {len(predicted)} and "
            f"{len(true)}"
        )
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for label in true if label not in index})
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is none of the classes {', '.join(classes)}")
    counts = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for label, name in zip(true, predicted, strict=True):
        counts[index[label], len(classes) if name is None else index[name]] += 1
    return counts


def class_scores(counts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Computes metrics of one confusion matrix `(K, K + 1)` or of a batch `(..., K, K + 1)`.

    Classes that occur neither as label nor as prediction count 0 in macro averages, as in
    scikit-learn with `labels` set to all classes; balanced accuracy averages over the classes that
    occur.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_f1`, `micro_f1`, each `(...)`, and `precision`,
        `recall`, `f1`, each `(..., K)`.
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    support = counts.sum(axis=-1)
    predicted = counts[..., :-1].sum(axis=-2)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    total = support.sum(axis=-1)
    return {
        "accuracy": _ratio(hits.sum(axis=-1), total),
        "balanced_accuracy": _ratio(recall.sum(axis=-1), (support > 0).sum(axis=-1)),
        "macro_f1": f1.mean(axis=-1),
        "micro_f1": _ratio(2 * hits.sum(axis=-1), total + predicted.sum(axis=-1)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }


def parse_class(answer: str, wordings: Mapping[str, Sequence[str]]) -> str | None:
    """Finds the class that an answer names.

    Args:
        answer: Answer of the model.
        wordings: Texts that denote each class. The class name counts only if it is listed.

    Returns:
        The class if exactly one is named; None if none, several, or a negated one.

    Example:
        >>> wordings = {"benign": ["benign"], "oscc": ["carcinoma", "OSCC"]}
        >>> parse_class("This is a squamous cell carcinoma.", wordings)
        'oscc'
    """
    said = words(plain(answer_part(answer)))
    named = {
        (name, tuple(text))
        for name, texts in wordings.items()
        for text in map(words, texts)
        if text and contains(said, text)
    }
    exact = {name for name, text in named if list(text) == said}
    if len(exact) == 1:
        return exact.pop()
    # A wording that occurs only within a longer matching wording does not count.
    longest = {
        (name, text)
        for name, text in named
        if not any(
            len(other) > len(text) and contains(list(other), list(text)) for _, other in named
        )
    }
    if len({name for name, _ in longest}) != 1:
        return None
    name, text = min(longest)
    return name if _num_negations(said) == _num_negations(text) else None


def _num_negations(text: Sequence[str]) -> int:
    return sum(word in _NEGATIONS for word in text)


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(
        numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator > 0
    )

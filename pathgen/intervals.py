"""Scores with bootstrap intervals: how much they would move with another draw of the images.

Percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552). Where a score depends on counts only,
n cases drawn with replacement are a multinomial draw of those counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

Array = NDArray[Any]


def count_interval(
    counts: Array, statistic: Callable[[Array], Array], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic of counts.

    Args:
        counts: How often each case occurred, of any shape.
        statistic: Takes `(num_resamples, *shape)` counts, returns `(num_resamples,)`; NaN where a
            resample does not define it.
        seed: Same seed, same interval.

    Raises:
        ValueError: All counts are zero.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("an interval of no cases is asked for")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(total, counts.ravel() / total, size=NUM_RESAMPLES)
    return _percentiles(statistic(draws.reshape(NUM_RESAMPLES, *counts.shape)))


def classification_scores(
    true: Array, predicted: Array, num_classes: int, *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy, balanced accuracy, F1 and the confusion matrix, with intervals.

    Classes that never occur count in no mean, as in scikit-learn.

    Args:
        true: int `(N,)`, classes from 0.
        predicted: int `(N,)`.
        num_classes: Of the matrix.
        seed: Of the intervals.
    """
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
    )

    labels = np.arange(num_classes)
    matrix = confusion_matrix(true, predicted, labels=labels)
    values: Mapping[str, tuple[float, Callable[[Array], Array]]] = {
        "accuracy": (accuracy_score(true, predicted), accuracy),
        "balanced_accuracy": (
            float(balanced_accuracy(matrix[None])[0]),  # as scikit-learn's, without its warning
            balanced_accuracy,
        ),
        "weighted_f1": (
            f1_score(true, predicted, labels=labels, average="weighted", zero_division=0),
            _weighted_f1,
        ),
    }
    scores: dict[str, Any] = {}
    for name, (value, statistic) in values.items():
        low, high = count_interval(matrix, statistic, seed=seed)
        scores[name] = {"value": float(value), "low": low, "high": high}
    recalls = matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
    return {
        **scores,
        "recall_per_class": [
            float(recall) if support else None
            for recall, support in zip(recalls, matrix.sum(axis=1), strict=True)
        ],
        "confusion_matrix": matrix.tolist(),
        "num_images": len(true),
    }


def accuracy(matrices: Array) -> Array:
    """Share of right cases, `(...,)` of confusion matrices `(..., K, K)`."""
    return np.trace(matrices, axis1=-2, axis2=-1) / matrices.sum(axis=(-2, -1))


def balanced_accuracy(matrices: Array) -> Array:
    """Mean recall of the classes that occur, `(...,)` of confusion matrices `(..., K, K)`."""
    support = matrices.sum(axis=-1)
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    recalls = np.divide(hits, support, where=support > 0, out=np.zeros(hits.shape))
    return recalls.sum(axis=-1) / (support > 0).sum(axis=-1)


def _weighted_f1(matrices: Array) -> Array:
    support, found = matrices.sum(axis=-1), matrices.sum(axis=-2)
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    both = support + found
    f1 = np.divide(2 * hits, both, where=both > 0, out=np.zeros(hits.shape))
    return (f1 * support).sum(axis=-1) / support.sum(axis=-1)


def macro_f1(matrices: Array) -> Array:
    """Mean F1 of the classes that occur, `(...,)` of confusion matrices `(..., K, K)`."""
    support, found = matrices.sum(axis=-1), matrices.sum(axis=-2)
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    f1 = np.divide(2 * hits, support + found, where=support > 0, out=np.zeros(hits.shape))
    return f1.sum(axis=-1) / (support > 0).sum(axis=-1)


def auroc_interval(true: Array, scores: Array, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the AUROC over draws of cases; NaN where no draw holds all classes.

    The AUROC is the share of pairs of a positive and a negative case that are in order, ties
    counting half (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747); of several classes
    the mean of one against the rest.

    Args:
        true: int `(N,)`.
        scores: `(N, K)`, of two classes those of the second count.
        seed: Same seed, same interval.
    """
    num_classes = scores.shape[1]
    columns = [1] if num_classes == 2 else range(num_classes)

    def statistic(draws: Array) -> Array:
        return np.mean([_auroc(true == k, scores[:, k], draws) for k in columns], axis=0)

    return count_interval(np.ones(len(true), dtype=np.int64), statistic, seed=seed)


def _auroc(positive: Array, scores: Array, draws: Array) -> Array:
    """AUROC `(num_draws,)` where case n occurs `draws[:, n]` times."""
    left, right = scores[positive][:, None], scores[~positive][None]
    ordered = (left > right) + 0.5 * (left == right)
    times, others = draws[:, positive].astype(float), draws[:, ~positive].astype(float)
    pairs = times.sum(axis=1) * others.sum(axis=1)
    hits = ((times @ ordered) * others).sum(axis=1)
    return np.divide(hits, pairs, where=pairs > 0, out=np.full(len(draws), np.nan))


def _percentiles(values: Array) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)

"""The scores of `gigapath.finetune.metrics` over many bootstrap draws at once.

scikit-learn's metrics take milliseconds a call, a thousand draws of seven classes a minute. Here
`counts` `(num_draws, num_cases)` says how often each case occurs in each draw. Where a draw does
not define a score, it is NaN. The tests hold each function against scikit-learn's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def count_draws(draws: Array, num_cases: int) -> Array:
    """Turns drawn case numbers `(num_draws, size)` into float counts `(num_draws, num_cases)`."""
    offsets = np.arange(len(draws))[:, None] * num_cases
    flat = np.bincount((draws + offsets).ravel(), minlength=len(draws) * num_cases)
    return flat.reshape(len(draws), num_cases).astype(np.float64)


def confusions(labels: Array, predicted: Array, num_classes: int, counts: Array) -> Array:
    """Confusion matrices `(num_draws, num_classes, num_classes)`, rows the true classes."""
    cells = labels * num_classes + predicted
    table = np.zeros((len(labels), num_classes**2))
    table[np.arange(len(labels)), cells] = 1
    return (counts @ table).reshape(-1, num_classes, num_classes)


def accuracy(matrices: Array) -> Array:
    """Share of right cases."""
    return _divide(np.trace(matrices, axis1=1, axis2=2), matrices.sum(axis=(1, 2)))


def balanced_accuracy(matrices: Array) -> Array:
    """Mean recall of the classes that occur."""
    support = matrices.sum(axis=2)
    recalls = _divide(np.diagonal(matrices, axis1=1, axis2=2), support, default=0.0)
    return _divide(recalls.sum(axis=1), (support > 0).sum(axis=1))


def weighted_f1(matrices: Array) -> Array:
    """Mean F1, weighted by how often a class occurs."""
    support, found = matrices.sum(axis=2), matrices.sum(axis=1)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    f1 = _divide(2 * hits, support + found, default=0.0)
    return _divide((f1 * support).sum(axis=1), support.sum(axis=1))


def macro_f1(matrices: Array) -> Array:
    """Mean F1 of the classes that occur."""
    support, found = matrices.sum(axis=2), matrices.sum(axis=1)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    f1 = np.where(support > 0, _divide(2 * hits, support + found, default=0.0), 0.0)
    return _divide(f1.sum(axis=1), (support > 0).sum(axis=1))


def quadratic_kappa(matrices: Array) -> Array:
    """Cohen's kappa with squared distances as weights (Cohen 1968, doi:10.1037/h0026256)."""
    numbers = np.arange(matrices.shape[1])
    weights = (numbers[:, None] - numbers[None]) ** 2
    total = matrices.sum(axis=(1, 2))
    expected = matrices.sum(axis=2)[:, :, None] * matrices.sum(axis=1)[:, None]
    observed = (weights * matrices).sum(axis=(1, 2)) * total
    return 1 - _divide(observed, (weights * expected).sum(axis=(1, 2)))


def auroc(positive: Array, scores: Array, counts: Array) -> Array:
    """Share of pairs of a positive and a negative case in order, ties counting half.

    Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.

    Args:
        positive: bool `(num_cases,)`.
        scores: float `(num_cases,)`.
        counts: `(num_draws, num_cases)`.
    """
    hits, misses = _by_score(positive, scores, counts)
    above = np.cumsum(hits, axis=1) - hits
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    return _divide(((above + hits / 2) * misses).sum(axis=1), pairs)


def average_precision(positive: Array, scores: Array, counts: Array) -> Array:
    """Sum over thresholds of the gain in recall times the precision, as scikit-learn's."""
    hits, misses = _by_score(positive, scores, counts)
    found = np.cumsum(hits, axis=1)
    precision = _divide(found, found + np.cumsum(misses, axis=1), default=0.0)
    values = _divide((hits * precision).sum(axis=1), hits.sum(axis=1))
    return np.where(misses.sum(axis=1) > 0, values, np.nan)


def _by_score(positive: Array, scores: Array, counts: Array) -> tuple[Array, Array]:
    """Positives and negatives `(num_draws, num_thresholds)` at each score, from the highest."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    counts, positive = counts[:, order], positive[order]
    hits = np.add.reduceat(counts * positive, starts, axis=1)
    return hits, np.add.reduceat(counts, starts, axis=1) - hits


def _divide(top: Array, bottom: Array, default: float = float("nan")) -> Array:
    out = np.full(np.broadcast_shapes(top.shape, bottom.shape), default)
    return np.divide(top, bottom, where=bottom > 0, out=out)

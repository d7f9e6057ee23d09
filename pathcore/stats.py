"""Bootstrap intervals, and scores over many bootstrap draws at once.

Scores of a single set of predictions come from scikit-learn. An interval needs them for a thousand
draws, and scikit-learn's functions take milliseconds a call: a minute for seven classes. Here a
draw is a row of counts, which says how often each case occurs in it, and a score is computed for
all draws together. The tests compare every function with scikit-learn's.

Shapes: R draws, N cases, K classes. Confusion matrices have the true classes in rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Interval = tuple[float, float]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


# --- intervals ----------------------------------------------------------------------------------


def percentile_interval(values: Array, confidence: float = CONFIDENCE) -> Interval:
    """Returns the percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Args:
        values: `(R,)`, the score in each draw; NaN where a draw does not define it.
        confidence: Probability that the interval covers.

    Returns:
        Lower and upper end; NaN if no draw defines the score.
    """
    if np.isnan(values).all():
        return float("nan"), float("nan")
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def count_interval(
    counts: Any,
    statistic: Callable[[Array], Array],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Returns the 95 % interval of a score that depends on counts only.

    Drawing n cases with replacement is then a multinomial draw of their counts, so nothing of
    size n is drawn.

    Args:
        counts: How often each case occurred, of any shape, such as a confusion matrix.
        statistic: Maps counts `(num_resamples, *shape)` to scores `(num_resamples,)`.
        seed: Seed of the draws.
        num_resamples: Number of draws.

    Raises:
        ValueError: If all counts are zero.

    Example:
        >>> low, high = count_interval([300, 700], lambda draws: draws[:, 0] / draws.sum(axis=1))
        >>> round(low, 2), round(high, 2)
        (0.27, 0.33)
    """
    counts = np.asarray(counts)
    total = int(counts.sum())
    if total == 0:
        raise ValueError("an interval was asked for, but there are no cases")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(total, counts.ravel() / total, size=num_resamples)
    return percentile_interval(statistic(draws.reshape(num_resamples, *counts.shape)))


def mean_interval(
    values: Sequence[float] | Array, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Returns the 95 % interval of a mean.

    Raises:
        ValueError: If there are no values.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)

    def mean(draws: Array) -> Array:
        return draws @ distinct / draws.sum(axis=-1)

    return count_interval(counts, mean, seed=seed, num_resamples=num_resamples)


# --- scores of confusion matrices (R, K, K) -----------------------------------------------------


def confusions(labels: Array, predicted: Array, num_classes: int, counts: Array) -> Array:
    """Returns the confusion matrix of every draw, `(R, K, K)`.

    Args:
        labels: int `(N,)`.
        predicted: int `(N,)`.
        num_classes: K.
        counts: `(R, N)`.
    """
    cells = labels * num_classes + predicted
    table = np.zeros((len(labels), num_classes**2))
    table[np.arange(len(labels)), cells] = 1
    return (counts @ table).reshape(-1, num_classes, num_classes)


def accuracy(matrices: Array) -> Array:
    """Returns the fraction of cases that are right."""
    return _divide(np.trace(matrices, axis1=-2, axis2=-1), matrices.sum(axis=(-2, -1)))


def recalls(matrices: Array) -> Array:
    """Returns the recall of each class, `(R, K)`; NaN for a class that does not occur."""
    return _divide(np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(axis=-1))


def balanced_accuracy(matrices: Array) -> Array:
    """Returns the mean recall of the classes that occur."""
    support = matrices.sum(axis=-1)
    hits = np.nan_to_num(recalls(matrices))
    return _divide(hits.sum(axis=-1), (support > 0).sum(axis=-1))


def weighted_f1(matrices: Array) -> Array:
    """Returns the mean F1 of the classes, weighted by how often each occurs."""
    support = matrices.sum(axis=-1)
    return _divide((_f1(matrices) * support).sum(axis=-1), support.sum(axis=-1))


def macro_f1(matrices: Array) -> Array:
    """Returns the mean F1 of the classes that occur."""
    present = matrices.sum(axis=-1) > 0
    return _divide(np.where(present, _f1(matrices), 0.0).sum(axis=-1), present.sum(axis=-1))


def kappa(matrices: Array, *, quadratic: bool = False) -> Array:
    """Returns Cohen's kappa, the agreement beyond that of the margins.

    Args:
        matrices: `(R, K, K)`.
        quadratic: Whether a confusion weighs as the squared distance of the classes (Cohen 1968,
            doi:10.1037/h0026256) and not the same for all (Cohen 1960,
            doi:10.1177/001316446002000104).
    """
    numbers = np.arange(matrices.shape[-1])
    distances = numbers[:, None] - numbers[None]
    weights = distances**2 if quadratic else (distances != 0).astype(float)
    total = matrices.sum(axis=(-2, -1))
    expected = matrices.sum(axis=-1)[..., :, None] * matrices.sum(axis=-2)[..., None, :]
    observed = (weights * matrices).sum(axis=(-2, -1)) * total
    return 1 - _divide(observed, (weights * expected).sum(axis=(-2, -1)))


def _f1(matrices: Array) -> Array:
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    return _divide(2 * hits, matrices.sum(axis=-1) + matrices.sum(axis=-2), default=0.0)


# --- scores of ranked cases ---------------------------------------------------------------------


def count_draws(draws: Array, num_cases: int) -> Array:
    """Turns drawn case numbers `(R, size)` into counts `(R, N)` of float64."""
    offsets = np.arange(len(draws))[:, None] * num_cases
    flat = np.bincount((draws + offsets).ravel(), minlength=len(draws) * num_cases)
    return flat.reshape(len(draws), num_cases).astype(np.float64)


def auroc(positive: Array, scores: Array, counts: Array) -> Array:
    """Returns the area under the ROC curve of every draw.

    That is the fraction of pairs of a positive and a negative case in which the positive scores
    higher, with ties counting half (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747).

    Args:
        positive: bool `(N,)`.
        scores: float `(N,)`.
        counts: `(R, N)`.

    Returns:
        `(R,)`; NaN where a draw lacks positive or negative cases.
    """
    hits, misses = _by_score(positive, scores, counts)
    above = np.cumsum(hits, axis=1) - hits
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    return _divide(((above + hits / 2) * misses).sum(axis=1), pairs)


def average_precision(positive: Array, scores: Array, counts: Array) -> Array:
    """Returns the sum over thresholds of the gain in recall times the precision.

    Args:
        positive: bool `(N,)`.
        scores: float `(N,)`.
        counts: `(R, N)`.

    Returns:
        `(R,)`; NaN where a draw lacks positive or negative cases.
    """
    hits, misses = _by_score(positive, scores, counts)
    found = np.cumsum(hits, axis=1)
    precision = _divide(found, found + np.cumsum(misses, axis=1), default=0.0)
    values = _divide((hits * precision).sum(axis=1), hits.sum(axis=1))
    return np.where(misses.sum(axis=1) > 0, values, np.nan)


def _by_score(positive: Array, scores: Array, counts: Array) -> tuple[Array, Array]:
    """Returns counts of positives and negatives `(R, T)` at each score, from the highest."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    counts, positive = counts[:, order].astype(np.float64), positive[order]
    hits = np.add.reduceat(counts * positive, starts, axis=1)
    return hits, np.add.reduceat(counts, starts, axis=1) - hits


def _divide(top: Array, bottom: Array, default: float = float("nan")) -> Array:
    out = np.full(np.broadcast_shapes(top.shape, bottom.shape), default)
    return np.divide(top, bottom, where=bottom > 0, out=out)

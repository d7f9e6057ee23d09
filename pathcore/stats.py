"""Bootstrap intervals, and scores that are vectorised over bootstrap draws.

Scores of a single set of predictions come from scikit-learn. Intervals need them for a thousand
draws, but scikit-learn's functions take milliseconds per call, or a minute in total for seven
classes. Here a draw is a row with the number of times each case occurs, and a score is computed for
all draws at once. Tests compare every function with scikit-learn's.

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
CALIBRATION_BINS = 15  # as in Guo et al. 2017 (arXiv:1706.04599)


# --- intervals ----------------------------------------------------------------------------------


def percentile_interval(values: Array, confidence: float = CONFIDENCE) -> Interval:
    """Returns the percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Args:
        values: Score of each draw `(R,)`; NaN where it is undefined.
        confidence: Confidence level.

    Returns:
        Lower and upper bound; NaN if the score is undefined in all draws.
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
    """Returns the 95 % bootstrap interval of a score that depends on counts only.

    Drawing n cases with replacement is equivalent to a multinomial draw of the counts, which takes
    no memory of size n.

    Args:
        counts: Counts of any shape, such as a confusion matrix.
        statistic: Function that maps counts `(R, *shape)` to scores `(R,)`.
        seed: Seed of the bootstrap.
        num_resamples: Number of draws R.

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


def cluster_interval(
    cases: Any,
    clusters: Sequence[str] | None,
    statistic: Callable[[Array], Array],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Returns the 95 % bootstrap interval of a score of sums over cases, resampling clusters.

    Questions about one image, or patches of one slide, resemble each other. Drawing whole clusters
    keeps that resemblance in the interval, which single cases would hide (Davison and Hinkley 1997,
    doi:10.1017/CBO9780511802843, section 3.8).

    Args:
        cases: What each case adds to the sums `(N, ...)`, such as `[value, 1]` for a mean or a
            one-hot confusion matrix.
        clusters: Cluster of each case; None if every case is its own.
        statistic: Function that maps sums `(R, ...)` to scores `(R,)`.
        seed: Seed of the bootstrap.
        num_resamples: Number of draws R.

    Raises:
        ValueError: If there are no cases, or not as many clusters as cases.

    Example:
        >>> cases = np.array([[1, 1], [1, 1], [0, 1], [0, 1]])
        >>> cluster_interval(cases, ["a", "a", "b", "b"], lambda sums: sums[:, 0] / sums[:, 1])
        (0.0, 1.0)
    """
    cases = np.asarray(cases, dtype=np.float64)
    if clusters is not None:
        if len(clusters) != len(cases):
            raise ValueError(f"expected a cluster per case, found {len(clusters)} for {len(cases)}")
        members, numbers = np.unique(list(clusters), return_inverse=True)
        sums = np.zeros((len(members), *cases.shape[1:]))
        np.add.at(sums, numbers, cases)
        cases = sums
    # Clusters with equal sums are interchangeable, so their counts suffice.
    flat = cases.reshape(len(cases), -1)
    distinct, counts = np.unique(flat, axis=0, return_counts=True)

    def score(draws: Array) -> Array:
        return statistic((draws @ distinct).reshape(len(draws), *cases.shape[1:]))

    return count_interval(counts, score, seed=seed, num_resamples=num_resamples)


def mean_interval(
    values: Sequence[float] | Array,
    clusters: Sequence[str] | None = None,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Returns the 95 % bootstrap interval of a mean, or of a mean paired difference.

    Args:
        values: Values, or differences of paired values.
        clusters: Cluster of each value; see `cluster_interval`.
        seed: Seed of the bootstrap.
        num_resamples: Number of draws.

    Raises:
        ValueError: If there are no values, or not as many clusters as values.
    """
    values = np.asarray(values, dtype=np.float64)
    cases = np.stack([values, np.ones_like(values)], axis=-1)
    return cluster_interval(
        cases,
        clusters,
        lambda sums: sums[:, 0] / sums[:, 1],
        seed=seed,
        num_resamples=num_resamples,
    )


def wilson_interval(hits: int, count: int) -> Interval:
    """Returns the 95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: If `count` is 0.
    """
    from scipy.stats import binomtest  # scipy.stats takes a second to import

    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


# --- scores of confusion matrices (R, K, K) -----------------------------------------------------


def confusion(labels: Array, predicted: Array, num_classes: int) -> Array:
    """Returns the confusion matrix `(K, K)`, true classes in rows.

    Args:
        labels: True classes, int `(N,)`.
        predicted: Predicted classes, int `(N,)`.
        num_classes: Number of classes K.

    Example:
        >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1.0, 1.0], [0.0, 1.0]]
    """
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.astype(np.float64).reshape(num_classes, num_classes)


def confusions(labels: Array, predicted: Array, num_classes: int, counts: Array) -> Array:
    """Returns the confusion matrices `(R, K, K)` of all draws.

    Args:
        labels: True classes, int `(N,)`.
        predicted: Predicted classes, int `(N,)`.
        num_classes: Number of classes K.
        counts: Number of times each case occurs in each draw `(R, N)`.

    Example:
        >>> labels, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
        >>> confusions(labels, predicted, 2, counts=np.array([[1, 1, 1], [3, 0, 0]])).tolist()
        [[[1.0, 1.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]]]
    """
    cells = labels * num_classes + predicted
    table = np.zeros((len(labels), num_classes**2))
    table[np.arange(len(labels)), cells] = 1
    return (counts @ table).reshape(-1, num_classes, num_classes)


def accuracy(matrices: Array) -> Array:
    """Returns the fraction of correct cases `(R,)`."""
    return _divide(np.trace(matrices, axis1=-2, axis2=-1), matrices.sum(axis=(-2, -1)))


def recalls(matrices: Array) -> Array:
    """Returns the recall of each class `(R, K)`; NaN for classes that do not occur."""
    return _divide(np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(axis=-1))


def balanced_accuracy(matrices: Array) -> Array:
    """Returns the mean recall `(R,)` of the classes that occur."""
    support = matrices.sum(axis=-1)
    hits = np.nan_to_num(recalls(matrices))
    return _divide(hits.sum(axis=-1), (support > 0).sum(axis=-1))


def weighted_f1(matrices: Array) -> Array:
    """Returns the mean F1 `(R,)` of all classes, weighted by their frequency."""
    support = matrices.sum(axis=-1)
    return _divide((_f1(matrices) * support).sum(axis=-1), support.sum(axis=-1))


def macro_f1(matrices: Array) -> Array:
    """Returns the mean F1 `(R,)` of the classes that occur."""
    present = matrices.sum(axis=-1) > 0
    return _divide(np.where(present, _f1(matrices), 0.0).sum(axis=-1), present.sum(axis=-1))


def kappa(matrices: Array, *, quadratic: bool = False) -> Array:
    """Returns Cohen's kappa `(R,)`, the agreement beyond chance.

    Args:
        matrices: Confusion matrices `(R, K, K)`.
        quadratic: Whether confusions are weighted by the squared difference of class indices (Cohen
            1968, doi:10.1037/h0026256) instead of equally (Cohen 1960,
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
    """Counts how often each case was drawn.

    Args:
        draws: Indices of the drawn cases, int `(R, size)`.
        num_cases: Number of cases N.

    Returns:
        float64 `(R, N)`.

    Example:
        >>> count_draws(np.array([[0, 0, 2], [1, 2, 2]]), 3).tolist()
        [[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]
    """
    # Offsets give each draw its own bins, so that one bincount counts all draws.
    offsets = np.arange(len(draws))[:, None] * num_cases
    flat = np.bincount((draws + offsets).ravel(), minlength=len(draws) * num_cases)
    return flat.reshape(len(draws), num_cases).astype(np.float64)


def auroc(positive: Array, scores: Array, counts: Array) -> Array:
    """Returns the area under the ROC curve of each draw.

    This equals the fraction of pairs of a positive and a negative case in which the positive case
    has the higher score, where ties count half (Hanley and McNeil 1982,
    doi:10.1148/radiology.143.1.7063747).

    Args:
        positive: Whether each case is positive, bool `(N,)`.
        scores: float `(N,)`.
        counts: Number of times each case occurs in each draw `(R, N)`.

    Returns:
        `(R,)`; NaN for draws without positive or without negative cases.

    Raises:
        ValueError: If a score is NaN.
    """
    hits, misses = _by_score(positive, scores, counts)
    above = np.cumsum(hits, axis=1) - hits
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    return _divide(((above + hits / 2) * misses).sum(axis=1), pairs)


def average_precision(positive: Array, scores: Array, counts: Array) -> Array:
    """Returns the average precision of each draw.

    This is the sum over thresholds of the increase in recall times the precision.

    Shapes are those of `auroc`.
    """
    hits, misses = _by_score(positive, scores, counts)
    found = np.cumsum(hits, axis=1)
    precision = _divide(found, found + np.cumsum(misses, axis=1), default=0.0)
    values = _divide((hits * precision).sum(axis=1), hits.sum(axis=1))
    return np.where(misses.sum(axis=1) > 0, values, np.nan)


def concordance(times: Array, events: Array, risks: Array, counts: Array) -> Array:
    """Returns Harrell's concordance index of each draw (Harrell et al. 1982, JAMA 247:2543).

    This is the fraction of comparable pairs in which the case with the earlier event has the higher
    risk, where equal risks count half. Pairs are comparable as in lifelines: the earlier time is
    that of an event, or the times are equal and one of the two is censored.

    Args:
        times: Time to event or end of observation, float `(N,)`.
        events: Whether the event was observed, bool `(N,)`.
        risks: float `(N,)`.
        counts: Number of times each case occurs in each draw `(R, N)`.

    Returns:
        `(R,)`; NaN for draws without comparable pairs.

    Raises:
        ValueError: If a time or risk is NaN.

    Example:
        >>> times, events = np.array([1.0, 2.0, 3.0]), np.array([True, True, False])
        >>> concordance(times, events, np.array([0.3, 0.9, 0.1]), np.ones((1, 3))).tolist()
        [0.6666666666666666]
    """
    _check_ranks("times", times)
    _check_ranks("risks", risks)
    later = times[None] > times[:, None]
    later |= (times[None] == times[:, None]) & ~events[None]
    comparable = (events[:, None] & later).astype(np.float64)
    order = np.sign(risks[:, None] - risks[None])
    won = comparable * (order + 1) / 2
    return _divide(((counts @ won) * counts).sum(axis=1), ((counts @ comparable) * counts).sum(1))


# --- calibration --------------------------------------------------------------------------------


def confidence_bins(confidence: Array, num_bins: int = CALIBRATION_BINS) -> Array:
    """Returns the bin of each probability, int `(N,)`; bins have equal width and include their end.

    These are the bins of `sklearn.calibration.calibration_curve`.
    """
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence)


def calibration_error(correct: Array, confidence: Array, num_bins: int = CALIBRATION_BINS) -> float:
    """Returns the expected calibration error (Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602).

    The mean over bins of equal width, weighted by their size, of the difference between the
    fraction of predictions that came true and their mean probability.

    Args:
        correct: Whether each prediction came true, bool `(N,)`.
        confidence: Its probability `(N,)`.
        num_bins: Number of bins; 15 as in Guo et al. 2017 (https://arxiv.org/abs/1706.04599).

    Example:
        >>> round(calibration_error(np.array([True, False]), np.array([0.9, 0.8])), 2)
        0.45
    """
    gaps = np.bincount(
        confidence_bins(confidence, num_bins), weights=correct - confidence, minlength=num_bins
    )
    return float(np.abs(gaps).sum() / len(confidence))


def _by_score(positive: Array, scores: Array, counts: Array) -> tuple[Array, Array]:
    """Returns the numbers of positives and negatives at each distinct score, highest first.

    Both have shape `(R, T)` for T distinct scores. Grouping equal scores is what makes ties count
    half.

    Raises:
        ValueError: If a score is NaN, which has no rank.
    """
    _check_ranks("scores", scores)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    counts, positive = counts[:, order].astype(np.float64), positive[order]
    hits = np.add.reduceat(counts * positive, starts, axis=1)
    return hits, np.add.reduceat(counts, starts, axis=1) - hits


def _check_ranks(name: str, values: Array) -> None:
    if count := int(np.isnan(values).sum()):
        raise ValueError(f"{name}: {count} of {len(values)} are NaN, which have no rank")


def _divide(top: Array, bottom: Array, default: float = float("nan")) -> Array:
    out = np.full(np.broadcast_shapes(top.shape, bottom.shape), default)
    return np.divide(top, bottom, where=bottom > 0, out=out)

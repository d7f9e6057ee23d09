"""Bootstrap confidence intervals over questions.

Percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552). Resampling n questions with
replacement is a multinomial draw of counts, so it suffices to draw counts of distinct values or of
the cells of a confusion matrix instead of n indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the 95 % interval of a mean.

    Raises:
        ValueError: If there are no values.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return count_interval(counts, lambda draws: draws @ distinct / draws.sum(axis=-1), seed=seed)


def count_interval(
    counts: Any,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *,
    seed: int = 0,
) -> Interval:
    """Returns the 95 % interval of a statistic of counts.

    Args:
        counts: Counts of any shape, such as a confusion matrix.
        statistic: Maps counts `(num_resamples, *shape)` to values `(num_resamples,)`.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If all counts are zero.
    """
    counts = np.asarray(counts)
    total = int(counts.sum())
    if total == 0:
        raise ValueError("an interval of no questions is asked for")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(total, counts.ravel() / total, size=NUM_RESAMPLES)
    values = statistic(draws.reshape(NUM_RESAMPLES, *counts.shape))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)

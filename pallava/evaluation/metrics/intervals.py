"""Bootstrap intervals: how much a score would move with another draw of the questions.

Percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552). Drawing n questions with replacement
is a multinomial draw of counts, so that nothing of size n is drawn: distinct values and cells of a
confusion matrix are enough.
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
    """95 % interval of a mean.

    Raises:
        ValueError: There are no values.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return count_interval(counts, lambda draws: draws @ distinct / draws.sum(axis=-1), seed=seed)


def count_interval(
    counts: Any,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *,
    seed: int = 0,
) -> Interval:
    """95 % interval of a statistic of counts.

    Args:
        counts: How often each case occurred, of any shape, such as a confusion matrix.
        statistic: Takes `(num_resamples, *shape)` counts, returns `(num_resamples,)`.
        seed: Same seed, same interval.

    Raises:
        ValueError: All counts are zero.
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

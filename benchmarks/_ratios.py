"""Ratios of two sides that were measured in turn, with their range over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """Ratio of a baseline's time to another's: how many times as fast the other is.

    Attributes:
        median: Median over the rounds.
        least: Least of all rounds.
        largest: Largest of all rounds.
    """

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, baseline: Sequence[float], times: Sequence[float]) -> Ratio:
        """Divides the times of each round."""
        ratios = [old / new for old, new in zip(baseline, times, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        """Returns the median, with the range in parentheses."""
        return f"{self.median:.2f} ({self.least:.2f} to {self.largest:.2f})"

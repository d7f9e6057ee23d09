"""Ratios of two sides that were measured in turn, with their range over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """Ratio of a baseline's time to another's: how many times as fast the other is.

    Attributes:
        median: Median over the rounds.
        limits: Least and largest of all rounds.
    """

    median: float
    limits: tuple[float, float]

    @classmethod
    def of(cls, baseline: Sequence[float], times: Sequence[float]) -> Ratio:
        """Divides the times of each round."""
        ratios = [old / new for old, new in zip(baseline, times, strict=True)]
        return cls(statistics.median(ratios), (min(ratios), max(ratios)))

    def __str__(self) -> str:
        """Returns the median, with the range in parentheses."""
        return f"{self:.2f}"

    def __format__(self, digits: str) -> str:
        """Formats the three numbers alike."""
        least, largest = self.limits
        return f"{self.median:{digits}} ({least:{digits}} to {largest:{digits}})"

"""Scores by number of training slides and seed, as a table with intervals and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathcore.figures import save_figure
from pathcore.files import StrPath

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """A run of a sweep.

    Attributes:
        method: Name of the method.
        num_slides: Number of training slides per class; 0 for a method without training.
        seed: Seed of the choice of slides, the weights and the order of patches.
    """

    method: str
    num_slides: int
    seed: int


@dataclass(frozen=True)
class Estimate:
    """Mean over `count` seeds with 95 % interval by Student's t; bounds are NaN for one seed."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean from independent runs.

    Raises:
        ValueError: If there are no runs.

    Example:
        >>> str(estimate([70.0, 72.0, 74.0]))
        '72.0 [67.0, 77.0]'
    """
    if not len(values):
        raise ValueError("an estimate of no runs is asked for")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"), 1)
    from scipy.stats import t

    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half, len(values))


class Sweep:
    """Scores of a sweep.

    Args:
        scores: Score of each cell; cells may be missing.
    """

    def __init__(self, scores: Mapping[Cell, float]) -> None:
        self.scores = dict(scores)
        self.methods = list(dict.fromkeys(cell.method for cell in scores))
        self.num_slides = sorted({cell.num_slides for cell in scores if cell.num_slides})

    def runs(self, method: str, num_slides: int) -> dict[int, float]:
        """Returns the scores by seed; for a method without training, its single score."""
        return {
            cell.seed: score
            for cell, score in self.scores.items()
            if cell.method == method and cell.num_slides in (num_slides, 0)
        }

    def estimate(self, method: str, num_slides: int) -> Estimate | None:
        """Estimates the mean of a method; returns None if it has no runs."""
        runs = self.runs(method, num_slides)
        return estimate(list(runs.values())) if runs else None

    def advantage(self, method: str, other: str, num_slides: int) -> Estimate | None:
        """Estimates the mean difference of two methods, paired by seed; None without pairs."""
        mine, others = self.runs(method, num_slides), self.runs(other, num_slides)
        untrained = {cell.method for cell in self.scores if not cell.num_slides}
        if other in untrained:  # its one score is compared with that of each seed
            others = dict.fromkeys(mine, *others.values())
        elif method in untrained:
            mine = dict.fromkeys(others, *mine.values())
        pairs = [mine[seed] - others[seed] for seed in mine if seed in others]
        return estimate(pairs) if pairs else None

    def table(self, compare: str | None = None) -> str:
        """Returns the table as Markdown.

        Args:
            compare: A method; the table gets further rows with its advantage over each other one.
        """
        head = ["method", *(f"{n} slide{'s' if n > 1 else ''}" for n in self.num_slides)]
        rows = [
            [method, *(self._text(self.estimate(method, n)) for n in self.num_slides)]
            for method in self.methods
        ]
        if compare is not None:
            rows += [
                [
                    f"{compare} minus {other}",
                    *(self._text(self.advantage(compare, other, n)) for n in self.num_slides),
                ]
                for other in self.methods
                if other != compare
            ]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def draw(self, path: StrPath, label: str, title: str = "") -> None:
        """Plots scores by number of slides as PNG, with a curve per method and error bars.

        Args:
            path: The PNG.
            label: Label of the vertical axis.
            title: Title of the plot.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), dpi=130)
        axes: Any = figure.add_subplot()
        positions = np.arange(len(self.num_slides))
        for index, method in enumerate(self.methods):
            found = [self.estimate(method, n) for n in self.num_slides]
            known = [(x, e) for x, e in zip(positions, found, strict=True) if e is not None]
            means = [e.mean for _, e in known]
            untrained = all(not c.num_slides for c in self.scores if c.method == method)
            if untrained:
                axes.plot(positions, means, "--", color="grey", label=method)
                continue
            half = [0.0 if e.count < 2 else e.high - e.mean for _, e in known]
            shift = 0.05 * (index - (len(self.methods) - 1) / 2)
            places = [x + shift for x, _ in known]
            axes.errorbar(places, means, yerr=half, marker="o", capsize=3, label=method)
        axes.set_xticks(positions, [str(n) for n in self.num_slides])
        axes.set(xlabel="training slides of each class", ylabel=label, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        save_figure(figure, path)

    @staticmethod
    def _text(value: Estimate | None) -> str:
        return "-" if value is None else str(value)

"""Reliability diagrams: accuracy of a classifier as a function of its confidence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore import stats

Array = NDArray[Any]


def confidences(labels: Array, probabilities: Array) -> tuple[Array, Array]:
    """Returns the probability of each prediction and whether it is correct.

    Args:
        labels: Class indices `(N,)`, or zeros and ones `(N, K)` if multi-label.
        probabilities: `(N, K)`.

    Returns:
        Two arrays `(N,)`: the highest probability of each case, and whether that class is the true
        one (Guo et al. 2017, https://arxiv.org/abs/1706.04599). If multi-label, `(N, K)`: the
        probability of each label, and the label.
    """
    if labels.ndim == 2:
        return probabilities, labels.astype(bool)
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def reliability_figure(labels: Array, probabilities: Array, title: str = "") -> Any:
    """Draws a reliability diagram with 95 % intervals and the number of predictions per bin.

    Args:
        labels: Class indices `(N,)`, or zeros and ones `(N, K)` if multi-label; all labels share
            one curve.
        probabilities: `(N, K)`.
        title: Title of the figure.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    confidence, correct = (values.ravel() for values in confidences(labels, probabilities))
    bins = stats.confidence_bins(confidence)
    figure = Figure(figsize=(4.4, 5.2), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    points = []
    for number in np.unique(bins):
        own = bins == number
        hits, count = int(correct[own].sum()), int(own.sum())
        low, high = stats.wilson_interval(hits, count)
        points.append((confidence[own].mean(), hits / count, low, high))
    x, y, lows, highs = np.array(points).T
    # A hit rate of 0 or 1 can lie a rounding error outside of its interval.
    errors = np.maximum([y - lows, highs - y], 0)
    upper.errorbar(x, y, yerr=errors, marker="o", capsize=3, label="observed, 95 % interval")
    gap = stats.calibration_error(correct, confidence)
    upper.set(ylabel="fraction that came true", ylim=(-0.03, 1.03), title=title)
    upper.text(0.97, 0.05, f"ECE {gap:.3f}", transform=upper.transAxes, ha="right")
    upper.legend(loc="upper left", fontsize="small")
    edges = np.linspace(0, 1, stats.CALIBRATION_BINS + 1)
    lower.hist(confidence, bins=list(edges), color="tab:blue", edgecolor="white")
    lower.set(xlabel="predicted probability", ylabel="predictions", xlim=(-0.02, 1.02))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure

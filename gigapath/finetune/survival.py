"""Survival: Cox's partial likelihood, its scores, and Kaplan-Meier curves by predicted risk.

Labels are `(S, 2)`: time to the event or to the end of observation, and 1 for an event, 0 for a
slide whose observation ended before (censored). The output of a model is one number per slide, the
logarithm of its hazard up to a constant: higher means earlier events.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def cox_loss(risks: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative logarithm of Cox's partial likelihood, per event.

    Each event is compared with the slides of the batch that were under observation at its time. Of
    d events at the same time, the l-th counts the d events themselves to the part `1 - l / d`
    (Efron 1977, doi:10.1080/01621459.1977.10480613), which is what lifelines does.

    Args:
        risks: `(S, 1)`.
        labels: `(S, 2)`, time and event.

    Returns:
        A scalar; 0 if there is no event.
    """
    risks = risks[:, 0]
    times, events = labels[:, 0], labels[:, 1] > 0
    if not events.any():
        return risks.sum() * 0
    at_risk = times[None] >= times[events][:, None]
    tied = (times[None] == times[events][:, None]) & events[None]
    earlier = tied & (torch.arange(len(times), device=times.device) < events.nonzero())
    part = earlier.sum(dim=1) / tied.sum(dim=1)
    weights = at_risk.to(risks) - part[:, None].to(risks) * tied
    # As a sum of exponentials without overflow; weights of 0 become infinitely small terms.
    return ((risks + weights.log()).logsumexp(dim=1) - risks[events]).mean()


def kaplan_meier_figure(labels: Array, risks: Array) -> Any:
    """Draws the survival of the halves with higher and lower predicted risk.

    The halves are divided at the median risk of these cases. The title has the p-value of the
    log-rank test, which is not evidence for a model that was selected on the same cases.

    Args:
        labels: `(N, 2)`, time and event.
        risks: `(N,)`.

    Returns:
        A matplotlib figure.
    """
    from lifelines import KaplanMeierFitter
    from lifelines.statistics import logrank_test
    from matplotlib.figure import Figure

    times, events = labels.T
    high = risks > np.median(risks)
    figure = Figure(figsize=(5.6, 4.2), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    for name, own, colour in (("lower", ~high, "tab:blue"), ("higher", high, "tab:red")):
        if not own.any():  # all risks are equal
            continue
        curve = KaplanMeierFitter().fit(times[own], events[own])
        survival = curve.survival_function_.iloc[:, 0]
        bounds = curve.confidence_interval_
        label = f"{name} risk: {own.sum()} cases, {int(events[own].sum())} events"
        axes.step(survival.index, survival, where="post", color=colour, label=label)
        axes.fill_between(
            bounds.index, bounds.iloc[:, 0], bounds.iloc[:, 1],
            step="post", color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
        censored = times[own & (events == 0)]
        axes.plot(censored, curve.predict(censored), "|", color=colour)
    title = "all risks are equal"
    if high.any():
        p = logrank_test(times[high], times[~high], events[high], events[~high]).p_value
        title = f"log-rank test: p = {p:.2g}"
    axes.set(xlabel="time", ylabel="survival", ylim=(-0.03, 1.03), title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")
    return figure

"""Scores by scikit-learn and lifelines, with intervals by SciPy's bootstrap.

Settings are named as in the published task files. In `multi_class` and `binary` each case has one
class and probabilities sum to 1; in `multi_label` classes are independent. `survival` is not in the
published files: each case has a time and an event (`gigapath.finetune.survival`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore import stats
from pathcore.calibration import confidences

Array = NDArray[Any]

SETTINGS = ("multi_class", "binary", "multi_label")
SURVIVAL = "survival"
NUM_RESAMPLES = 1000

LOWER_IS_BETTER = ("ece", "brier")
"""Scores that are errors."""

_COUNTS_AT_ONCE = 4_000_000
"""Number of case counts per batch of bootstrap draws; bounds the memory."""

_LABEL_HITS = (
    ("accuracy", stats.accuracy),
    ("balanced_accuracy", stats.balanced_accuracy),
)
_CLASS_HITS = (
    *_LABEL_HITS,
    ("weighted_f1", stats.weighted_f1),
    ("macro_f1", stats.macro_f1),
    ("quadratic_kappa", partial(stats.kappa, quadratic=True)),
)


def score_predictions(
    labels: Array,
    probabilities: Array,
    classes: Sequence[str],
    *,
    setting: str = "multi_class",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes scores of predictions with 95 % percentile bootstrap intervals over cases.

    `auroc` and `auprc` are means over the classes that have both positive and negative cases. For
    `binary` they are those of the second class, and `macro_auprc` is the mean over both classes.
    `balanced_accuracy` is the mean recall of the classes that occur. `quadratic_kappa` weights
    confusions by the squared difference of the class indices. For `multi_label`, a class is
    predicted if its probability is at least 0.5, and `accuracy`, `balanced_accuracy`, `ece` and
    `brier` are means over classes. `ece` has no interval, because resampling adds to it: the error
    of a perfectly calibrated classifier is 0, but not that of a resample.

    For `survival`, the only score is `c_index`, Harrell's concordance index.

    Args:
        labels: int `(num_cases,)`, or 0 and 1 `(num_cases, num_classes)` for `multi_label`, or
            times and events `(num_cases, 2)` for `survival`.
        probabilities: float `(num_cases, num_classes)`; risks `(num_cases, 1)` for `survival`.
        classes: Names of the classes, in the order of the columns.
        setting: One of `SETTINGS`, or `SURVIVAL`.
        num_resamples: Number of resamples of the bootstrap (Efron 1979,
            doi:10.1214/aos/1176344552); 0 computes no intervals.
        seed: Seed of the bootstrap.

    Returns:
        For each score `value`, `low` and `high` (None where undefined). Also `per_class` with
        `auroc`, `auprc` and `num_cases` of each class, `num_cases`, and `undefined`, the classes
        without positive or without negative cases. For `survival`, also `num_events`.

    Raises:
        ValueError: If there are no cases, shapes do not fit, a label is no class, a probability,
            risk or time is not finite, or the setting is unknown.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
        >>> scores = score_predictions(
        ...     np.array([0, 1, 1, 1]), probabilities, ["benign", "tumour"], setting="binary"
        ... )
        >>> scores["accuracy"]["value"], scores["auroc"]["value"]
        (0.75, 1.0)
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check(labels, probabilities, classes, setting)
    with warnings.catch_warnings():  # scikit-learn and NumPy warn of classes absent from a draw
        warnings.simplefilter("ignore")
        if setting == SURVIVAL:
            return _survival(labels, probabilities[:, 0], num_resamples, seed)
        values = _values(labels, probabilities, setting)
        ranges = _intervals(labels, probabilities, setting, num_resamples, seed)
    found = {n: _entry(v, *ranges.get(n, (np.nan, np.nan))) for n, v in values.items()}
    present = _one_hot(labels, len(classes)).sum(axis=0)
    scores: dict[str, Any] = {n: entry for n, entry in found.items() if not _of_class(n)}
    scores["per_class"] = {
        str(name): {
            "auroc": found[f"auroc/{index}"],
            "auprc": found[f"auprc/{index}"],
            "num_cases": int(present[index]),
        }
        for index, name in enumerate(classes)
    }
    scores["num_cases"] = len(labels)
    scores["undefined"] = [
        str(name) for name, count in zip(classes, present, strict=True) if count in (0, len(labels))
    ]
    return scores


def score_names(setting: str) -> tuple[str, ...]:
    """Returns the names of the scores of a setting, without per-class scores."""
    if setting == SURVIVAL:
        return ("c_index",)
    curves = {
        "multi_class": ("auroc", "auprc"),
        "binary": ("auroc", "auprc", "macro_auprc"),
        "multi_label": ("auroc", "auprc", "micro_auroc", "micro_auprc"),
    }
    hits = _LABEL_HITS if setting == "multi_label" else _CLASS_HITS
    return (*(name for name, _ in hits), *curves[setting], *LOWER_IS_BETTER)


def plain_values(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the values of `score_predictions` without intervals and per-class scores."""
    return {name: s["value"] for name, s in scores.items() if isinstance(s, dict) and "value" in s}


def _check(labels: Array, probabilities: Array, classes: Sequence[str], setting: str) -> None:
    if setting not in (*SETTINGS, SURVIVAL):
        raise ValueError(f"setting {setting!r}: expected one of {', '.join((*SETTINGS, SURVIVAL))}")
    if setting == "binary" and len(classes) != 2:
        raise ValueError(f"setting binary: expected 2 classes, found {len(classes)}")
    if not len(labels):
        raise ValueError("scores of no cases are asked for")
    shape = (len(labels), len(classes))
    wanted = {"multi_label": shape, SURVIVAL: (len(labels), 2)}.get(setting, shape[:1])
    if probabilities.shape != shape or labels.shape != wanted:
        raise ValueError(
            f"labels {labels.shape} and probabilities {probabilities.shape}: "
            f"expected {wanted} and {shape}"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: infinities or NaN; the model has diverged")
    if setting == SURVIVAL:
        if not np.isfinite(labels).all():
            raise ValueError("times and events: infinities or NaN; leave out cases without them")
        return
    # Negative numbers would count from the last class.
    limit = 2 if setting == "multi_label" else len(classes)
    if strange := sorted(set(np.unique(labels)) - set(range(limit))):
        raise ValueError(
            f"labels: found {strange[0]}, expected whole numbers from 0 to {limit - 1}"
        )


def _survival(labels: Array, risks: Array, num_resamples: int, seed: int) -> dict[str, Any]:
    from lifelines.utils import concordance_index

    times, events = labels[:, 0], labels[:, 1] > 0
    try:
        value = float(concordance_index(times, -risks, events))
    except ZeroDivisionError:  # no comparable pair
        value = float("nan")

    def score(counts: Array) -> dict[str, Array]:
        return {"c_index": stats.concordance(times, events, risks, counts)}

    ranges = _bootstrap(score, len(labels), num_resamples, seed)
    return {
        "c_index": _entry(value, *ranges.get("c_index", (np.nan, np.nan))),
        "num_cases": len(labels),
        "num_events": int(events.sum()),
        "undefined": [],
    }


def _values(labels: Array, probabilities: Array, setting: str) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    num_classes = probabilities.shape[1]
    table = _one_hot(labels, num_classes)
    values = _hits(labels, probabilities, setting)
    per_class = {}
    for index, (true, column) in enumerate(zip(table.T, probabilities.T, strict=True)):
        occurs, absent = true.any(), not true.all()
        both = occurs and absent
        per_class[f"auroc/{index}"] = roc_auc_score(true, column) if both else np.nan
        per_class[f"auprc/{index}"] = average_precision_score(true, column) if both else np.nan
    columns = [1] if setting == "binary" else range(num_classes)
    for name in ("auroc", "auprc"):
        values[name] = _mean([per_class[f"{name}/{index}"] for index in columns])
    if setting == "binary":
        values["macro_auprc"] = _mean([per_class[f"auprc/{index}"] for index in (0, 1)])
    if setting == "multi_label":
        both = table.any() and not table.all()
        pooled, ranked = table.ravel(), probabilities.ravel()
        values["micro_auroc"] = roc_auc_score(pooled, ranked) if both else np.nan
        values["micro_auprc"] = average_precision_score(pooled, ranked) if both else np.nan
    confidence, correct = confidences(labels, probabilities)
    values["ece"] = _mean(
        [
            stats.calibration_error(*pair)
            for pair in zip(_columns(correct), _columns(confidence), strict=True)
        ]
    )
    values["brier"] = float(_squared_errors(table, probabilities, setting).mean())
    return {**values, **per_class}


def _columns(values: Array) -> Array:
    """Returns the columns of an array; one if it is a vector."""
    return np.atleast_2d(values.T)


def _squared_errors(table: Array, probabilities: Array, setting: str) -> Array:
    """Returns the Brier score of each case `(N,)`, as `sklearn.metrics.brier_score_loss` scales it.

    The sum over the classes; half of it for `binary`, and the mean for `multi_label`.
    """
    errors = np.square(probabilities - table)
    return errors.sum(axis=1) if setting == "multi_class" else errors.mean(axis=1)


def _hits(labels: Array, probabilities: Array, setting: str) -> dict[str, float]:
    """Returns the scores that depend on predicted classes only."""
    from sklearn.metrics import (
        accuracy_score,
        balanced_accuracy_score,
        cohen_kappa_score,
        f1_score,
    )

    if setting == "multi_label":
        predicted = probabilities >= 0.5
        pairs = list(zip(labels.T, predicted.T, strict=True))
        return {
            "accuracy": _mean([accuracy_score(true, said) for true, said in pairs]),
            "balanced_accuracy": _mean(
                [balanced_accuracy_score(true, said) for true, said in pairs]
            ),
        }
    predicted, numbers = probabilities.argmax(axis=1), np.arange(probabilities.shape[1])
    return {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "weighted_f1": f1_score(
            labels, predicted, labels=numbers, average="weighted", zero_division=0
        ),
        # Averaged over the classes that occur, like the balanced accuracy.
        "macro_f1": f1_score(
            labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
        ),
        # All classes are listed, since an omitted one would shrink the distances between the rest.
        "quadratic_kappa": cohen_kappa_score(
            labels, predicted, labels=numbers, weights="quadratic"
        ),
    }


def _intervals(
    labels: Array, probabilities: Array, setting: str, num_resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    score = partial(_drawn, labels, probabilities, setting)
    return _bootstrap(score, len(labels), num_resamples, seed)


def _bootstrap(
    score: Callable[[Array], dict[str, Array]], num_cases: int, num_resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Returns the interval of each score; `score` maps counts `(R, N)` to scores `(R,)`."""
    if num_resamples < 1 or num_cases < 2:  # SciPy's bootstrap refuses a single case
        return {}
    from scipy.stats import bootstrap

    names: list[str] = []

    def statistic(draws: Array, axis: int = -1) -> Array:
        # Counting how often each case was drawn lets all draws be scored in one matrix product.
        found = score(stats.count_draws(draws.reshape(-1, draws.shape[-1]), num_cases))
        names[:] = found
        return np.stack(list(found.values())).reshape(len(names), *draws.shape[:-1])

    drawn = bootstrap(
        (np.arange(num_cases),),
        statistic,
        n_resamples=num_resamples,
        batch=max(1, _COUNTS_AT_ONCE // num_cases),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    return {
        name: stats.percentile_interval(values) for name, values in zip(names, drawn, strict=True)
    }


def _drawn(labels: Array, probabilities: Array, setting: str, counts: Array) -> dict[str, Array]:
    """Returns the scores of `_values` but `ece` for each draw, as arrays `(num_draws,)`."""
    num_classes = probabilities.shape[1]
    columns = list(zip(_one_hot(labels, num_classes).T, probabilities.T, strict=True))
    if setting == "multi_label":
        said = (probabilities >= 0.5).astype(np.int64)
        matrices = [
            stats.confusions(labels[:, k].astype(np.int64), said[:, k], 2, counts)
            for k in range(num_classes)
        ]
        values = {name: np.mean([f(m) for m in matrices], axis=0) for name, f in _LABEL_HITS}
    else:
        matrix = stats.confusions(labels, probabilities.argmax(1), num_classes, counts)
        values = {name: function(matrix) for name, function in _CLASS_HITS}
    curves = (("auroc", stats.auroc), ("auprc", stats.average_precision))
    per_class = {
        f"{name}/{k}": curve(true, column, counts)
        for k, (true, column) in enumerate(columns)
        for name, curve in curves
    }
    for name, curve in curves:
        of_classes = np.stack([per_class[f"{name}/{k}"] for k in range(num_classes)])
        values[name] = of_classes[1] if setting == "binary" else np.nanmean(of_classes, axis=0)
        if setting == "binary" and name == "auprc":
            values["macro_auprc"] = of_classes.mean(axis=0)
        if setting == "multi_label":
            pooled = np.repeat(counts, num_classes, axis=1)
            true = np.stack([column for column, _ in columns], axis=1).ravel()
            values[f"micro_{name}"] = curve(true, probabilities.ravel(), pooled)
    table = _one_hot(labels, num_classes)
    values["brier"] = counts @ _squared_errors(table, probabilities, setting) / counts.sum(axis=1)
    return {**values, **per_class}


def _one_hot(labels: Array, num_classes: int) -> Array:
    return labels.astype(bool) if labels.ndim == 2 else np.eye(num_classes, dtype=bool)[labels]


def _of_class(name: str) -> bool:
    return "/" in name


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if np.isfinite(value)]
    return float(np.mean(found)) if found else float("nan")


def _entry(*values: float) -> dict[str, float | None]:
    names = ("value", "low", "high")
    return {n: float(v) if np.isfinite(v) else None for n, v in zip(names, values, strict=True)}

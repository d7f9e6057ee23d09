"""Scores of patches and slides: those of the published code, AUROC, kappa, and intervals.

Accuracies are percentages in float32, as in the published code (Zhang et al. 2023,
https://github.com/Yunkun-Zhang/CITE); `auroc` is in [0, 1], `kappa` in [-1, 1]. `ece` and `brier`,
the errors of calibration, are undefined unless scores are probabilities. Names of scores over
slides start with `bag_`.

Shapes: N patches, K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathcore import stats
from pathcore.calibration import confidences

Voting = Literal["soft", "hard"]
Array = NDArray[Any]

PATCH_METRICS = (
    "accuracy",
    "class_accuracy",
    "mean_accuracy",
    "auroc",
    "kappa",
    "ece",
    "brier",
)
SLIDE_METRICS = (
    "bag_accuracy",
    "bag_class_accuracy",
    "mean_bag_accuracy",
    "bag_auroc",
    "bag_kappa",
    "bag_ece",
    "bag_brier",
)
PUBLISHED_METRICS = ("accuracy", "class_accuracy", "bag_accuracy", "bag_class_accuracy")

NUM_RESAMPLES = 1000
_CHUNK = 1 << 24
"""Number of weights of resampled cases in memory."""


@dataclass(frozen=True)
class Predictions:
    """Scores and labels of cases, each of which belongs to a slide.

    Args:
        scores: float `(N, K)`; higher is more likely, for example softmax.
        labels: int `(N,)`, class indices.
        slides: Slide of each case `(N,)`.

    Raises:
        ValueError: If lengths differ, there are no cases, scores are not finite, a label is out of
            range, or a slide has several labels.
    """

    scores: Array
    labels: Array
    slides: Array

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores)
        scores = scores.astype(np.float32) if scores.dtype == np.float16 else scores
        labels, slides = np.asarray(self.labels), np.asarray(self.slides)
        if scores.ndim != 2 or not len(scores) or not len(scores) == len(labels) == len(slides):
            raise ValueError(
                f"scores are {scores.shape}, with {len(labels)} labels and {len(slides)} slides; "
                "expected (N, K), N and N, at least one"
            )
        if not np.isfinite(scores).all():
            case = int(np.argmin(np.isfinite(scores).all(axis=1)))
            raise ValueError(f"case {case} (slide {slides[case]}): its scores are not finite")
        outside = (labels < 0) | (labels >= scores.shape[1])
        if outside.any():
            case = int(np.argmax(outside))
            raise ValueError(
                f"case {case} (slide {slides[case]}) has label {labels[case]}; expected 0 to "
                f"{scores.shape[1] - 1}"
            )
        _, first, inverse = np.unique(slides, return_index=True, return_inverse=True)
        other = labels != labels[first][inverse]
        if other.any():
            case = int(np.argmax(other))
            raise ValueError(
                f"slide {slides[case]} has patches of several labels: "
                f"{labels[first][inverse][case]} and {labels[case]}"
            )
        for name, value in (("scores", scores), ("labels", labels), ("slides", slides)):
            object.__setattr__(self, name, value)

    @property
    def num_classes(self) -> int:
        """Number of classes K, including those without cases."""
        return int(self.scores.shape[1])

    @property
    def are_probabilities(self) -> bool:
        """Whether the scores of each case are at least 0 and sum to 1."""
        sums = self.scores.sum(axis=1)
        return bool((self.scores >= 0).all() and np.allclose(sums, 1, atol=1e-3))

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Class with the highest score `(N,)`; the first one of a tie."""
        return np.argmax(self.scores, axis=1)


def vote(predictions: Predictions, voting: Voting = "soft") -> Predictions:
    """Aggregates the patches of each slide, in the order of the slides' first patches.

    Args:
        predictions: Predictions of patches.
        voting: `soft` for the mean of the scores, as published; `hard` for the fraction of patches
            predicted as a class, where the mean of the scores breaks ties.

    Raises:
        ValueError: If `voting` is unknown.

    Example:
        >>> patches = Predictions([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]], [0, 0, 0], ["a"] * 3)
        >>> vote(patches).predicted.tolist(), vote(patches, "hard").predicted.tolist()
        ([1], [0])
    """
    if voting not in ("soft", "hard"):
        raise ValueError(f"voting is {voting!r}; expected 'soft' or 'hard'")
    _, first, inverse = np.unique(predictions.slides, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    scores = np.stack([predictions.scores[group].mean(axis=0) for group in groups])
    if voting == "hard":
        votes = np.eye(predictions.num_classes)[predictions.predicted]
        shares = np.stack([votes[group].mean(axis=0) for group in groups])
        # Fractions of n patches differ by at least 1/n. The scaled scores are below 1/(4n), so they
        # only break ties.
        spread = max(1.0, float(np.abs(scores).max()))
        scores = shares + scores / (4 * spread * len(predictions.labels))
    by_appearance = np.argsort(first)
    first = first[by_appearance]
    return Predictions(scores[by_appearance], predictions.labels[first], predictions.slides[first])


def compute_metrics(
    patches: Predictions,
    metrics: Sequence[str] = PUBLISHED_METRICS,
    *,
    voting: Voting = "soft",
    num_resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Computes scores of patches and slides.

    Classes without cases have no score and are excluded from means. `mean_accuracy` is also known
    as balanced accuracy; `class_accuracy` returns it together with `accuracy_0`, `accuracy_1`, ...

    Args:
        patches: Predictions of patches.
        metrics: Names from `PATCH_METRICS` and `SLIDE_METRICS`.
        voting: How patches of a slide are aggregated, see `vote`.
        num_resamples: Number of bootstrap resamples for 95 % percentile intervals, `<name>_low` and
            `<name>_high`; 0 computes none. Slides are resampled with all their patches, because
            patches of a slide are not independent.
        seed: Seed of the bootstrap.

    Returns:
        Scores by name.

    Raises:
        ValueError: If a metric is unknown.

    Example:
        >>> patches = Predictions([[0.6, 0.4], [0.2, 0.8], [0.1, 0.9]], [0, 0, 1], ["a", "a", "b"])
        >>> compute_metrics(patches, ["mean_accuracy", "bag_accuracy"])["bag_accuracy"]
        50.0
    """
    unknown = [name for name in metrics if name not in (*PATCH_METRICS, *SLIDE_METRICS)]
    if unknown:
        raise ValueError(
            f"metric {unknown[0]!r} is not supported; expected some of "
            f"{', '.join((*PATCH_METRICS, *SLIDE_METRICS))}"
        )
    results: dict[str, float] = {}
    for prefix, wanted, cases in (
        ("bag_", [m for m in metrics if m in SLIDE_METRICS], lambda: vote(patches, voting)),
        ("", [m for m in metrics if m in PATCH_METRICS], lambda: patches),
    ):
        if wanted:
            names = {name.replace("bag_", "") for name in wanted}
            results |= _named(_point_scores(cases(), names), prefix)
            if num_resamples:
                results |= _named(_intervals(cases(), names, num_resamples, seed), prefix)
    return results


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Returns the confusion matrix `(K, K)`, with true classes in rows."""
    from sklearn.metrics import confusion_matrix

    classes = np.arange(predictions.num_classes)
    counts: NDArray[np.int64] = confusion_matrix(
        predictions.labels, predictions.predicted, labels=classes
    )
    return counts


def confusion_figure(counts: Array, classes: Sequence[str], title: str = "") -> Any:
    """Draws a confusion matrix with counts, coloured by the fraction of the true class.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 1.2 * len(classes), 2.2 + 1.0 * len(classes)), dpi=120)
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares, display_labels=[_wrap(name) for name in classes])
    display.plot(ax=axes, cmap="Blues", im_kw={"vmin": 0, "vmax": 1}, include_values=False)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour)
    axes.tick_params(axis="x", rotation=30)
    axes.set(title=title)
    figure.tight_layout()
    return figure


def _named(scores: dict[str, float], prefix: str) -> dict[str, float]:
    mean = f"mean_{prefix}accuracy"
    return {
        name.replace("mean_accuracy", mean) if name.startswith("mean_") else prefix + name: score
        for name, score in scores.items()
    }


def _point_scores(cases: Predictions, names: set[str]) -> dict[str, float]:
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    correct = cases.predicted == cases.labels
    results: dict[str, float] = {}
    if "accuracy" in names:
        results["accuracy"] = _percentage(correct)
    if names & {"class_accuracy", "mean_accuracy"}:
        present = np.unique(cases.labels)
        by_class = {int(c): _percentage(correct[cases.labels == c]) for c in present}
        results |= {f"accuracy_{c}": score for c, score in by_class.items()}
        results["mean_accuracy"] = sum(by_class.values()) / len(by_class)
    if "auroc" in names:
        areas = [
            roc_auc_score(cases.labels == c, cases.scores[:, c]) for c in _separable(cases.labels)
        ]
        results["auroc"] = float(np.mean(areas)) if areas else float("nan")
    if "kappa" in names:
        several = len(np.union1d(cases.labels, cases.predicted)) > 1
        kappa = cohen_kappa_score(cases.labels, cases.predicted) if several else float("nan")
        results["kappa"] = float(kappa)
    if "ece" in names:
        confidence, correct = confidences(cases.labels, cases.scores)
        error = stats.calibration_error(correct, confidence) if cases.are_probabilities else None
        results["ece"] = float("nan") if error is None else error
    if "brier" in names:
        results["brier"] = float(_squared_errors(cases).mean())
    return results


def _squared_errors(cases: Predictions) -> Array:
    """Returns the Brier score of each case `(N,)`, scaled as scikit-learn's; NaN for other scores.

    The sum over the classes, or half of it for two.
    """
    if not cases.are_probabilities:
        return np.full(len(cases.labels), np.nan)
    errors = np.square(cases.scores - np.eye(cases.num_classes)[cases.labels]).sum(axis=1)
    return errors / 2 if cases.num_classes == 2 else errors


def _percentage(correct: Array) -> float:
    # In float32 and in this order, to reproduce the published figures exactly.
    return float(np.float32(correct.sum()) * np.float32(100.0 / len(correct)))


def _separable(labels: Array) -> list[int]:
    present = np.unique(labels)
    return present.tolist() if len(present) > 1 else []


def _intervals(
    cases: Predictions, names: set[str], num_resamples: int, seed: int
) -> dict[str, float]:
    _, slide = np.unique(cases.slides, return_inverse=True)
    num_slides = int(slide.max()) + 1
    draws = np.random.default_rng(seed).multinomial(
        num_slides, np.full(num_slides, 1 / num_slides), size=num_resamples
    )
    k = cases.num_classes
    cells = (slide * k + cases.labels) * k + cases.predicted
    by_slide = np.bincount(cells, minlength=num_slides * k * k).reshape(num_slides, k * k)
    counts = (draws @ by_slide).reshape(num_resamples, k, k)
    values: dict[str, Array] = {}
    for name in sorted(names):
        if name == "auroc":
            values[name] = _resampled_auroc(cases, slide, draws)
        elif name == "brier":
            sums = np.bincount(slide, weights=_squared_errors(cases), minlength=num_slides)
            values[name] = draws @ sums / (draws @ np.bincount(slide, minlength=num_slides))
        elif name != "ece":  # resampling adds to the error, so that its interval would mislead
            values |= _FROM_COUNTS[name](counts)
    results: dict[str, float] = {}
    for name, drawn in values.items():
        if np.isfinite(drawn).any():
            low, high = stats.percentile_interval(drawn)
            results |= {f"{name}_low": low, f"{name}_high": high}
    return results


def _resampled_auroc(cases: Predictions, slide: Array, draws: Array) -> Array:
    classes = _separable(cases.labels)
    if not classes:
        return np.full(len(draws), np.nan)
    rows = max(1, _CHUNK // len(slide))
    chunks = []
    for start in range(0, len(draws), rows):
        weights = draws[start : start + rows][:, slide]
        areas = [stats.auroc(cases.labels == c, cases.scores[:, c], weights) for c in classes]
        chunks.append(np.nanmean(areas, axis=0))
    return np.concatenate(chunks)


def _drawn_accuracy(counts: Array) -> dict[str, Array]:
    return {"accuracy": 100 * stats.accuracy(counts)}


def _drawn_class_accuracy(counts: Array) -> dict[str, Array]:
    recalls = 100 * stats.recalls(counts)
    by_class = {f"accuracy_{c}": recalls[:, c] for c in range(recalls.shape[1])}
    return by_class | {"mean_accuracy": 100 * stats.balanced_accuracy(counts)}


def _drawn_kappa(counts: Array) -> dict[str, Array]:
    return {"kappa": stats.kappa(counts)}


_FROM_COUNTS: dict[str, Callable[[Array], dict[str, Array]]] = {
    "accuracy": _drawn_accuracy,
    "class_accuracy": _drawn_class_accuracy,
    "mean_accuracy": _drawn_class_accuracy,
    "kappa": _drawn_kappa,
}


def _wrap(name: str) -> str:
    return fill(name, 18)

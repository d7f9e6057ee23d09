"""Cheap comparisons on vectors: nearest neighbours and logistic regression, by scikit-learn.

A vector is a tile's embedding, the mean of a slide's tiles, or a stored slide embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_NEIGHBOURS = 20
"""As in DINO's evaluation (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.1)."""

C_GRID = tuple(10.0**power for power in range(-4, 3))
"""Inverse strengths of the L2 penalty that the validation cases choose from."""


@dataclass(frozen=True)
class VectorSplit:
    """Cases of one split.

    Attributes:
        ids: Names.
        vectors: float `(num_cases, embed_dim)`.
        labels: int `(num_cases,)`, of several labels 0 or 1 `(num_cases, num_classes)`.
    """

    ids: tuple[str, ...]
    vectors: Array
    labels: Array


Predict = Callable[[Array], Array]
"""Vectors `(num_cases, embed_dim)` -> probabilities `(num_cases, num_classes)`."""


def fit_knn(train: VectorSplit, val: VectorSplit | None, num_classes: int) -> Predict:
    """Nearest neighbours by cosine, weighted by nearness; needs no validation cases."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    def fitted(labels: Array) -> Any:
        count = min(NUM_NEIGHBOURS, len(train.vectors))
        # On vectors of length 1 Euclidean distance orders as the cosine does, and BLAS computes it.
        model = KNeighborsClassifier(count, weights="distance", algorithm="brute")
        return model.fit(normalize(train.vectors), labels)

    predict = _each(fitted, train.labels, num_classes)
    return lambda vectors: predict(normalize(vectors))


def fit_logistic(train: VectorSplit, val: VectorSplit | None, num_classes: int) -> Predict:
    """Logistic regression on standardised vectors; validation loss chooses the penalty.

    Without validation cases the penalty is scikit-learn's default.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(strength: float) -> Predict:
        def fitted(labels: Array) -> Any:
            model = LogisticRegression(C=strength, max_iter=1000)
            return make_pipeline(StandardScaler(), model).fit(train.vectors, labels)

        return _each(fitted, train.labels, num_classes)

    if val is None or not len(val.ids):
        return fit(1.0)
    models = [fit(strength) for strength in C_GRID]
    losses = [_log_loss(val.labels, model(val.vectors)) for model in models]
    return models[int(np.argmin(losses))]


METHODS: dict[str, Callable[[VectorSplit, VectorSplit | None, int], Predict]] = {
    "knn": fit_knn,
    "logistic": fit_logistic,
}


def _each(fitted: Callable[[Array], Any], labels: Array, num_classes: int) -> Predict:
    """One model of all classes, or one for each of several labels; absent classes get 0."""
    if labels.ndim == 1:
        model = _model(fitted, labels)
        return lambda vectors: _spread(model, vectors, num_classes)
    models = [_model(fitted, labels[:, index]) for index in range(num_classes)]
    return lambda vectors: np.stack([_spread(m, vectors, 2)[:, 1] for m in models], axis=1)


def _model(fitted: Callable[[Array], Any], labels: Array) -> Any:
    labels = labels.astype(np.int64)
    return int(labels[0]) if len(np.unique(labels)) == 1 else fitted(labels)


def _spread(model: Any, vectors: Array, num_classes: int) -> Array:
    table = np.zeros((len(vectors), num_classes))
    if isinstance(model, int):  # training knew one class only
        table[:, model] = 1
    else:
        table[:, model.classes_] = model.predict_proba(vectors)
    return table


def _log_loss(labels: Array, probabilities: Array) -> float:
    if labels.ndim == 1:
        right = probabilities[np.arange(len(labels)), labels]
    else:
        right = np.where(labels > 0, probabilities, 1 - probabilities)
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def check_methods(methods: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Returns the methods, each once.

    Raises:
        ValueError: One that there is not.
    """
    known = (*own, *METHODS)
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"method {unknown[0]!r}: one of {', '.join(known)} expected")
    return tuple(dict.fromkeys(methods))

"""Baselines on vectors: nearest neighbours or prototypes, logistic and Cox regression.

A vector is the embedding of a tile, the mean over the tiles of a slide, or a slide embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore.names import did_you_mean

Array = NDArray[Any]

NUM_NEIGHBOURS = 20
"""Number of neighbours in DINO's evaluation (Caron et al. 2021, https://arxiv.org/abs/2104.14294,
section 4.1)."""

NUM_COMPONENTS = 32
"""Number of principal components of Cox regression: cohorts have few events per coefficient."""

COX_PENALTY = 0.1
"""L2 penalty of Cox regression on standardised components."""

C_GRID = tuple(10.0**power for power in range(-4, 3))
"""Inverse strengths of the L2 penalty, among which the validation loss selects."""


@dataclass(frozen=True)
class VectorSplit:
    """Cases of one split.

    Attributes:
        ids: Names of the cases.
        vectors: float `(num_cases, embed_dim)`.
        labels: int `(num_cases,)`, or zeros and ones `(num_cases, num_classes)` if multi-label, or
            times and events `(num_cases, 2)` for survival.
    """

    ids: tuple[str, ...]
    vectors: Array
    labels: Array


Predict = Callable[[Array], Array]
"""Maps vectors `(num_cases, embed_dim)` to probabilities `(num_cases, num_classes)`, or to risks
`(num_cases, 1)`."""


def fit_knn(
    train: VectorSplit,
    val: VectorSplit | None,
    num_classes: int,
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    weights: str = "distance",
    centre: bool = False,
) -> Predict:
    """Fits nearest neighbours by cosine; ignores the validation cases.

    Args:
        train: Training cases.
        val: Ignored.
        num_classes: Number of classes.
        num_neighbours: Number of neighbours; all training cases if there are fewer.
        weights: `distance` weights neighbours by their inverse distance, `uniform` equally.
        centre: Whether to subtract the mean of the training vectors first.
    """
    from sklearn.neighbors import KNeighborsClassifier

    prepare = _unit_vectors(train.vectors, centre)

    def fitted(labels: Array) -> Any:
        count = min(num_neighbours, len(train.vectors))
        # The Euclidean distance of unit vectors sorts like the cosine distance and is faster,
        # because scikit-learn computes it by BLAS.
        model = KNeighborsClassifier(count, weights=weights, algorithm="brute")
        return model.fit(prepare(train.vectors), labels)

    predict = _each(fitted, train.labels, num_classes)
    return lambda vectors: predict(prepare(vectors))


def fit_logistic(
    train: VectorSplit,
    val: VectorSplit | None,
    num_classes: int,
    *,
    cost: float | str = "search",
    max_iter: int = 1000,
    standardise: bool = True,
    join_val: bool = False,
) -> Predict:
    """Fits scikit-learn's logistic regression.

    Args:
        train: Training cases.
        val: Validation cases; None or empty if there are none.
        num_classes: Number of classes K.
        cost: Inverse strength of the L2 penalty. `adaptive` is `embed_dim * K / 100` (Chen et al.
            2024, doi:10.1038/s41591-024-02857-3). `search` selects among `C_GRID` by the
            validation loss; without validation cases it is scikit-learn's default, 1.
        max_iter: Maximum number of iterations of L-BFGS.
        standardise: Whether to standardise each dimension first.
        join_val: Whether to train on the validation cases too.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, labels = train.vectors, train.labels
    has_val = val is not None and len(val.ids) > 0
    if join_val and val is not None and has_val:
        vectors = np.concatenate([vectors, val.vectors])
        labels = np.concatenate([labels, val.labels])

    def fit(strength: float) -> Predict:
        def fitted(own: Array) -> Any:
            model = LogisticRegression(C=strength, max_iter=max_iter)
            steps = (StandardScaler(), model) if standardise else (model,)
            return make_pipeline(*steps).fit(vectors, own)

        return _each(fitted, labels, num_classes)

    if cost == "adaptive":
        return fit(vectors.shape[1] * num_classes / 100)
    if cost != "search":
        return fit(float(cost))
    if val is None or not has_val:
        return fit(1.0)
    models = [fit(strength) for strength in C_GRID]
    losses = [_log_loss(val.labels, model(val.vectors)) for model in models]
    return models[int(np.argmin(losses))]


def fit_simpleshot(
    train: VectorSplit, val: VectorSplit | None, num_classes: int, *, centre: bool = True
) -> Predict:
    """Fits nearest prototypes; ignores the validation cases.

    A prototype is the mean of the unit vectors of a class (Wang et al. 2019, SimpleShot,
    https://arxiv.org/abs/1911.04623). Probabilities are the softmax of minus the squared distances
    to the prototypes (Snell et al. 2017, equation 2, https://arxiv.org/abs/1703.05175); the class
    with the nearest one has the highest.

    Args:
        train: Training cases; a class that has none gets probability 0.
        val: Ignored.
        num_classes: Number of classes.
        centre: Whether to subtract the mean of the training vectors first.

    Raises:
        ValueError: If cases have several labels.
    """
    if train.labels.ndim != 1:
        raise ValueError("simpleshot: expected one class per case, found a multi-label task")
    from scipy.special import softmax

    prepare = _unit_vectors(train.vectors, centre)
    present = np.unique(train.labels)
    unit = prepare(train.vectors)
    prototypes = np.stack([unit[train.labels == index].mean(axis=0) for index in present])

    def predict(vectors: Array) -> Array:
        # The squared length of the vectors is omitted: it is the same for every prototype.
        similarity = 2 * prepare(vectors) @ prototypes.T - np.square(prototypes).sum(axis=1)
        table = np.zeros((len(vectors), num_classes))
        table[:, present] = softmax(similarity, axis=1)
        return table

    return predict


def _unit_vectors(train: Array, centre: bool) -> Callable[[Array], Array]:
    from sklearn.preprocessing import normalize

    mean = train.mean(axis=0) if centre else 0.0
    return lambda vectors: normalize(vectors - mean)


def fit_cox(train: VectorSplit, val: VectorSplit | None, num_classes: int) -> Predict:
    """Fits lifelines' Cox regression on principal components; ignores the validation cases."""
    import pandas as pd
    from lifelines import CoxPHFitter
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(NUM_COMPONENTS, len(train.vectors) - 1, train.vectors.shape[1])
    components = make_pipeline(StandardScaler(), PCA(count, random_state=0), StandardScaler()).fit(
        train.vectors
    )
    table = pd.DataFrame(components.transform(train.vectors))
    table[["time", "event"]] = train.labels
    model = CoxPHFitter(penalizer=COX_PENALTY).fit(table, "time", "event")
    return lambda vectors: model.predict_log_partial_hazard(
        pd.DataFrame(components.transform(vectors))
    ).to_numpy()[:, None]


METHODS: dict[str, Callable[..., Predict]] = {
    "knn": fit_knn,
    "logistic": fit_logistic,
    "simpleshot": fit_simpleshot,
}
"""Classifiers."""

SURVIVAL_METHODS: dict[str, Callable[..., Predict]] = {
    "cox": fit_cox,
}


def _each(fitted: Callable[[Array], Any], labels: Array, num_classes: int) -> Predict:
    """Fits one model of all classes, or one per label if multi-label; absent classes get 0."""
    if labels.ndim == 1:
        model = _model(fitted, labels)
        return lambda vectors: _spread(model, vectors, num_classes)
    models = [_model(fitted, labels[:, index]) for index in range(num_classes)]
    return lambda vectors: np.stack([_spread(m, vectors, 2)[:, 1] for m in models], axis=1)


def _model(fitted: Callable[[Array], Any], labels: Array) -> Any:
    # scikit-learn refuses to fit a single class; a constant prediction replaces the model then.
    labels = labels.astype(np.int64)
    return int(labels[0]) if len(np.unique(labels)) == 1 else fitted(labels)


def _spread(model: Any, vectors: Array, num_classes: int) -> Array:
    table = np.zeros((len(vectors), num_classes))
    if isinstance(model, int):  # the only class in training
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


def check_methods(
    methods: Sequence[str], own: Sequence[str], *, survival: bool = False
) -> tuple[str, ...]:
    """Removes duplicates from methods.

    Raises:
        ValueError: If a method is unknown, or not one for the kind of task.
    """
    known = (*own, *(SURVIVAL_METHODS if survival else METHODS))
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"method {unknown[0]!r}: unknown{did_you_mean(unknown[0], known)}")
    return tuple(dict.fromkeys(methods))

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from pathcore.stats import (
    auroc,
    average_precision,
    balanced_accuracy,
    concordance,
    count_interval,
    kappa,
    macro_f1,
    mean_interval,
    percentile_interval,
    weighted_f1,
)
from pathgen.clip.zero_shot import classification_scores


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
def test_scores_of_counts_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = np.array(pairs).T
    matrix = np.zeros((1, 4, 4), dtype=np.int64)
    np.add.at(matrix[0], (true, predicted), 1)
    assert balanced_accuracy(matrix)[0] == pytest.approx(balanced_accuracy_score(true, predicted))
    labels = np.unique(true)
    macro = f1_score(true, predicted, labels=labels, average="macro", zero_division=0)
    assert macro_f1(matrix)[0] == pytest.approx(macro)
    weighted = f1_score(true, predicted, average="weighted", zero_division=0)
    assert weighted_f1(matrix)[0] == pytest.approx(weighted)
    if len(np.union1d(true, predicted)) > 1:
        for weights in (None, "quadratic"):
            theirs = cohen_kappa_score(true, predicted, labels=np.arange(4), weights=weights)
            found = kappa(matrix, quadratic=weights is not None)[0]
            assert found == pytest.approx(theirs)


def test_intervals_hold_the_value_and_narrow_with_more_images() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for size in (100, 10000):
        true = generator.integers(0, 3, size)
        predicted = np.where(generator.random(size) < 0.7, true, (true + 1) % 3)
        scores = classification_scores(true, predicted, 4)
        for name in ("accuracy", "balanced_accuracy", "weighted_f1"):
            assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        widths.append(scores["accuracy"]["high"] - scores["accuracy"]["low"])
        assert scores["recall_per_class"][3] is None
    assert widths[1] < widths[0] / 5
    again = classification_scores(true, predicted, 4)
    assert again == scores


def test_interval_of_a_share_agrees_with_the_normal_one() -> None:
    low, high = count_interval(np.array([300, 700]), lambda d: d[:, 0] / d.sum(1))
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)


def test_intervals_of_clusters_are_those_of_drawn_clusters() -> None:
    generator = np.random.default_rng(2)
    clusters = [f"slide{number // 5}" for number in range(200)]
    values = np.repeat(generator.normal(size=40), 5) + 0.1 * generator.normal(size=200)
    means = values.reshape(40, 5).mean(axis=1)
    drawn = means[generator.integers(0, 40, (4000, 40))].mean(axis=1)
    low, high = mean_interval(values, clusters)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.04)
    alone = mean_interval(values)
    assert high - low > 1.8 * (alone[1] - alone[0])  # five alike count as about one
    assert mean_interval(values, [str(number) for number in range(200)]) == alone
    with pytest.raises(ValueError, match="found 40 for 200"):
        mean_interval(values, clusters[:40])


def test_auroc_of_drawn_cases_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    true = generator.random(40) < 0.4
    scores = np.round(generator.normal(size=40) + true, 1)  # with ties
    draws = generator.multinomial(40, np.full(40, 1 / 40), size=5)
    expected = [roc_auc_score(np.repeat(true, draw), np.repeat(scores, draw)) for draw in draws]
    np.testing.assert_allclose(auroc(true, scores, draws), expected)
    precisions = [
        average_precision_score(np.repeat(true, draw), np.repeat(scores, draw)) for draw in draws
    ]
    np.testing.assert_allclose(average_precision(true, scores, draws), precisions)
    many = generator.multinomial(40, np.full(40, 1 / 40), size=500)
    low, high = percentile_interval(auroc(true, scores, many))
    assert low < roc_auc_score(true, scores) < high
    alone = auroc(np.zeros(4, dtype=bool), np.ones(4), np.ones((3, 4)))
    assert np.isnan(alone).all() and np.isnan(percentile_interval(alone)).all()


def test_scores_that_are_nan_have_no_rank() -> None:
    ones, some, nan = np.ones((1, 3)), np.array([True, False, True]), np.array([0.1, np.nan, 0.5])
    for area in (auroc, average_precision):
        with pytest.raises(ValueError, match="scores: 1 of 3 are NaN"):
            area(some, nan, ones)
    for name, times, risks in (("times", nan, some), ("risks", np.arange(3.0), nan)):
        with pytest.raises(ValueError, match=f"{name}: 1 of 3 are NaN"):
            concordance(times, some, risks, ones)


def test_no_cases_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no cases"):
        count_interval(np.zeros(3), lambda draws: draws[:, 0])

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from gigapath.finetune import metrics
from gigapath.finetune.metrics import SETTINGS, plain_values, score_names, score_predictions
from pathcore import stats

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/gigapath/finetune/finetune.json").read_text()
)
NAMES = {"bacc": "balanced_accuracy", "acc": "accuracy", "qwk": "quadratic_kappa",
         "macro_auroc": "auroc", "macro_auprc": "auprc"}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "setting", "classes"),
    [
        ("metrics_multiclass", "multi_class", tuple("012345")),
        ("metrics_multilabel", "multi_label", ("EGFR", "FAT1", "KRAS", "LRP1B", "TP53")),
        ("metrics_binary", "binary", ("neg", "pos")),
    ],
)
def test_published_values(case: str, setting: str, classes: Any) -> None:
    golden = GOLDEN[case]
    labels = np.array(golden.get("labels", golden.get("label")))
    scores = score_predictions(
        labels, np.array(golden["probs"]), list(classes), setting=setting, num_resamples=200
    )
    for name, value in golden["result"].items():
        own, _, kind = name.rpartition("_")
        if own in classes:
            found = scores["per_class"][own][kind]["value"]
        elif setting == "binary" and name == "macro_auprc":
            found = scores["macro_auprc"]["value"]
        else:
            found = scores[NAMES.get(name, name)]["value"]
        assert found == pytest.approx(value, abs=1e-12), name
    for name, value in plain_values(scores).items():
        assert value is not None
        if name == "ece":
            assert scores[name]["low"] is scores[name]["high"] is None
            continue
        assert scores[name]["low"] < value < scores[name]["high"], name
    assert tuple(plain_values(scores)) == tuple(sorted(
        score_names(setting), key=list(plain_values(scores)).index))  # fmt: skip
    assert set(plain_values(scores)) == set(score_names(setting))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), setting=st.sampled_from(SETTINGS), num_cases=st.integers(1, 25))
def test_draws_are_scored_as_scikit_learn_scores_them(
    seed: int, setting: str, num_cases: int
) -> None:
    """Ties, classes that a draw lacks and draws of one case included."""
    generator = np.random.default_rng(seed)
    classes = 2 if setting == "binary" else 3
    shape = (num_cases, classes)
    several = setting == "multi_label"
    labels = (
        generator.integers(0, 2, shape) if several else generator.integers(0, classes, num_cases)
    )
    probabilities = np.round(generator.random(shape), 1)
    if not several:
        probabilities = (probabilities + 0.05) / (probabilities + 0.05).sum(1, keepdims=True)
    draws = generator.integers(0, num_cases, (4, num_cases))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = stats.count_draws(draws, num_cases)
        found = metrics._drawn(labels, probabilities, setting, counts)
        for number, draw in enumerate(draws):
            expected = metrics._values(labels[draw], probabilities[draw], setting)
            assert {*found, "ece"} == set(expected)
            for name, value in expected.items():
                if name == "ece":
                    continue
                np.testing.assert_allclose(found[name][number], value, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
def test_calibration_is_that_of_scikit_learn(setting: str) -> None:
    generator = np.random.default_rng(0)
    classes = 2 if setting == "binary" else 3
    probabilities = generator.dirichlet([0.5] * classes, 80)
    several = setting == "multi_label"
    labels = (
        generator.integers(0, 2, probabilities.shape)
        if several
        else generator.integers(0, classes, 80)
    )
    scores = score_predictions(
        labels, probabilities, "abc"[:classes], setting=setting, num_resamples=200
    )
    if several:
        pairs = [(labels[:, k], probabilities[:, k]) for k in range(classes)]
        brier = np.mean([brier_score_loss(*pair) for pair in pairs])
    else:
        pairs = [(probabilities.argmax(1) == labels, probabilities.max(1))]
        brier = brier_score_loss(labels, probabilities[:, 1] if classes == 2 else probabilities)
    gaps = []
    for true, sure in pairs:
        rate, mean = calibration_curve(true, sure, n_bins=15)
        sizes = np.bincount(stats.confidence_bins(sure))
        gaps.append((np.abs(rate - mean) * sizes[sizes > 0]).sum() / len(sure))
    assert scores["ece"]["value"] == pytest.approx(np.mean(gaps))
    assert scores["brier"]["value"] == pytest.approx(brier)
    assert scores["brier"]["low"] < brier < scores["brier"]["high"]


def test_an_absent_class_is_named_and_leaves_the_others_alone() -> None:
    labels = np.array([0, 0, 2, 2, 0, 2])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.1, 0.7], [0.1, 0.2, 0.7],
                              [0.3, 0.1, 0.6], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3]])  # fmt: skip
    scores = score_predictions(labels, probabilities, ["a", "b", "c"], num_resamples=50)
    assert scores["undefined"] == ["b"]
    assert scores["per_class"]["b"]["auroc"]["value"] is None
    both = [scores["per_class"][name]["auroc"]["value"] for name in "ac"]
    assert scores["auroc"]["value"] == pytest.approx(np.mean(both))
    # Class 1 keeps its place between 0 and 2: confusing 0 with 2 costs four times 0 with 1.
    # Observed: once 4, once 1. By chance, of 6: 3 * 1 + 4 * 3 * 3 + 4 * 3 * 2 + 3 * 1.
    assert scores["quadratic_kappa"]["value"] == pytest.approx(1 - 5 / (66 / 6))
    one = score_predictions(np.zeros(3, int), probabilities[:3], ["a", "b", "c"], num_resamples=9)
    assert one["auroc"] == {"value": None, "low": None, "high": None}


def test_intervals_repeat_and_narrow_with_more_cases() -> None:
    generator = np.random.default_rng(0)

    def width(count: int) -> float:
        labels = generator.integers(0, 2, count)
        raised = 1 / (1 + np.exp(-(labels + generator.normal(0, 1, count))))
        both = np.stack([1 - raised, raised], axis=1)
        first, second = (
            score_predictions(labels, both, ["n", "p"], setting="binary", num_resamples=200)
            for _ in range(2)
        )
        assert first == second
        return float(first["auroc"]["high"] - first["auroc"]["low"])

    assert width(2000) < width(50) / 3


@pytest.mark.parametrize(
    ("labels", "probabilities", "setting", "message"),
    [
        (np.zeros(0, int), np.zeros((0, 2)), "binary", "no cases"),
        (np.zeros(3, int), np.zeros((3, 3)), "binary", "2 classes"),
        (np.zeros(3, int), np.full((3, 2), np.nan), "multi_class", "diverged"),
        (np.zeros(3, int), np.zeros((3, 2)), "multi_label", "labels"),
        (np.zeros(3, int), np.zeros((3, 2)), "regression", "setting"),
        (np.array([0, 1, -1]), np.eye(3)[:, :2], "binary", "found -1, expected .* 0 to 1"),
        (np.array([0, 1, 3]), np.eye(3), "multi_class", "found 3, expected .* 0 to 2"),
        (-np.eye(3, dtype=int), np.eye(3), "multi_label", "found -1, expected .* 0 to 1"),
        (np.array([[1.0, 1], [np.inf, 0]]), np.eye(2)[:, :1], "survival", "times and events"),
    ],
)
def test_bad_input(labels: Any, probabilities: Any, setting: str, message: str) -> None:
    names = [str(number) for number in range(probabilities.shape[1])]
    with pytest.raises(ValueError, match=message):
        score_predictions(labels, probabilities, names, setting=setting)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    roc_auc_score,
)

from cite.bag_metrics import (
    PATCH_METRICS,
    SLIDE_METRICS,
    Predictions,
    compute_metrics,
    confusion_figure,
    confusion_matrix,
    vote,
)
from pathcore import stats
from pathcore.figures import save_figure

GOLDEN = Path(__file__).parents[1] / "golden" / "cite"
PUBLISHED = json.loads((GOLDEN / "metrics.json").read_text())
ALL = ("accuracy", "class_accuracy", "mean_accuracy")
ALL_BAG = ("bag_accuracy", "bag_class_accuracy", "mean_bag_accuracy")


def golden(dtype: type = np.float32) -> Predictions:
    lines = [line.split() for line in (GOLDEN / "metrics_ann.txt").read_text().splitlines()]
    scores = np.loadtxt(GOLDEN / "metrics_scores.csv", delimiter=",", dtype=np.float32)
    slides = [name.split("_")[0] for name, _ in lines]
    return Predictions(scores.astype(dtype), np.array([int(c) for _, c in lines]), np.array(slides))


def made_up(seed: int = 0, num_slides: int = 30) -> Predictions:
    generator = np.random.default_rng(seed)
    slides = generator.integers(num_slides, size=300)
    labels = slides % 3
    scores = generator.dirichlet(np.ones(3), size=300) + 0.3 * np.eye(3)[labels]
    return Predictions(scores, labels, slides)


def test_published_metrics() -> None:
    assert compute_metrics(golden(), (*ALL_BAG, *ALL)) == PUBLISHED["all_metrics"]
    half = compute_metrics(golden(np.float16), (*ALL_BAG, *ALL))
    assert half == PUBLISHED["float16_scores_all_metrics"]
    assert compute_metrics(golden()) == PUBLISHED["config_metrics"]
    for name in (*ALL_BAG, *ALL):
        assert compute_metrics(golden(), [name]) == PUBLISHED[f"single:{name}"]


def test_published_slides() -> None:
    slides = vote(golden())
    assert slides.slides.tolist() == list(PUBLISHED["bags"])
    for row, bag in zip(range(8), PUBLISHED["bags"].values(), strict=True):
        np.testing.assert_allclose(slides.scores[row], bag["mean_score"], rtol=1e-6)
        assert slides.labels[row] == bag["label"]
        assert slides.predicted[row] == bag["pred"]


def test_ties_go_to_the_first_class() -> None:
    scores = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    expected = PUBLISHED["edge_cases"][
        "ties [.5,.5,0] label 0; [.5,.5,0] label 1; [0,.5,.5] label 2"
    ]
    assert compute_metrics(Predictions(scores, [0, 1, 2], list("abc")), ALL) == expected


def test_absent_class_does_not_count() -> None:
    scores = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]
    found = compute_metrics(
        Predictions(scores, [0, 1, 1], list("abc")), (*PATCH_METRICS, *SLIDE_METRICS)
    )
    assert found["mean_accuracy"] == 75.0
    assert "accuracy_2" not in found
    assert found["bag_auroc"] == 1.0


def test_one_class_has_no_area_and_no_kappa() -> None:
    found = compute_metrics(Predictions([[0.9, 0.1]], [0], ["a"]), ("auroc", "kappa"))
    assert np.isnan(list(found.values())).all()


def test_scores_are_those_of_scikit_learn() -> None:
    cases = made_up()
    found = compute_metrics(cases, PATCH_METRICS)
    balanced = 100 * balanced_accuracy_score(cases.labels, cases.predicted)
    assert found["mean_accuracy"] == pytest.approx(balanced)
    shares = cases.scores / cases.scores.sum(axis=1, keepdims=True)
    by_class = [roc_auc_score(cases.labels == c, cases.scores[:, c]) for c in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(by_class))
    assert roc_auc_score(cases.labels, shares, multi_class="ovr") == pytest.approx(
        found["auroc"], abs=0.05
    )
    assert found["kappa"] == pytest.approx(cohen_kappa_score(cases.labels, cases.predicted))
    assert np.isnan(found["ece"]) and np.isnan(found["brier"])  # the scores are no probabilities
    sure = Predictions(shares, cases.labels, cases.slides)
    found = compute_metrics(sure, ("ece", "brier"), num_resamples=200)
    assert found["brier"] == pytest.approx(brier_score_loss(cases.labels, shares), rel=1e-4)
    assert found["brier_low"] < found["brier"] < found["brier_high"]
    rate, mean = calibration_curve(cases.predicted == cases.labels, shares.max(axis=1), n_bins=15)
    sizes = np.bincount(stats.confidence_bins(shares.max(axis=1)))
    gap = (np.abs(rate - mean) * sizes[sizes > 0]).sum() / len(shares)
    assert found["ece"] == pytest.approx(gap, rel=1e-4) and "ece_low" not in found
    two = Predictions([[0.9, 0.1], [0.4, 0.6]], [0, 0], ["a", "b"])
    half = brier_score_loss([0, 0], [0.1, 0.6], pos_label=1)
    assert compute_metrics(two, ("bag_brier",))["bag_brier"] == pytest.approx(half)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.booleans())
def test_weighted_area_is_that_of_repeated_cases(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(4, size=20) / 4 if ties else generator.random(20)
    positive = np.arange(20) % 2 == 0
    weights = generator.integers(3, size=(5, 20)) + (np.arange(20) < 2)
    areas = stats.auroc(positive, scores, weights)
    for row, area in zip(weights, areas, strict=True):
        repeated = np.repeat(np.arange(20), row)
        assert area == pytest.approx(roc_auc_score(positive[repeated], scores[repeated]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_order_of_the_patches_does_not_matter(seed: int) -> None:
    cases = made_up(seed)
    order = np.random.default_rng(seed + 1).permutation(len(cases.labels))
    shuffled = Predictions(cases.scores[order], cases.labels[order], cases.slides[order])
    for voting in ("soft", "hard"):
        first, second = (
            compute_metrics(c, (*PATCH_METRICS, *SLIDE_METRICS), voting=voting)
            for c in (cases, shuffled)
        )
        assert first == pytest.approx(second, nan_ok=True)


def test_hard_voting_counts_patches_and_breaks_ties_by_score() -> None:
    scores = [[0.51, 0.49], [0.51, 0.49], [0.0, 1.0], [0.51, 0.49], [0.1, 0.9]]
    cases = Predictions(scores, [0, 0, 0, 1, 1], ["a", "a", "a", "b", "b"])
    assert vote(cases, "hard").predicted.tolist() == [0, 1]
    with pytest.raises(ValueError, match="expected 'soft' or 'hard'"):
        vote(cases, "loud")  # type: ignore[arg-type]


def test_intervals_hold_the_score_and_shrink_with_more_slides() -> None:
    names = (*PATCH_METRICS, *SLIDE_METRICS)
    widths = []
    for num_slides in (12, 200):
        found = compute_metrics(made_up(num_slides=num_slides), names, num_resamples=400)
        for name in ("accuracy", "mean_accuracy", "auroc", "kappa", "bag_accuracy", "bag_kappa"):
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"], name
        assert found["mean_bag_accuracy_low"] <= found["mean_bag_accuracy"]
        widths.append(found["accuracy_high"] - found["accuracy_low"])
    assert widths[1] < widths[0]


def test_patches_of_a_slide_are_drawn_together() -> None:
    """Ten copies of every patch hold no more information about slides."""
    few = made_up(num_slides=12)
    many = Predictions(*(np.repeat(a, 10, axis=0) for a in (few.scores, few.labels, few.slides)))
    names = PATCH_METRICS
    assert compute_metrics(few, names, num_resamples=200) == pytest.approx(
        compute_metrics(many, names, num_resamples=200), rel=1e-5, nan_ok=True
    )


def test_what_cannot_be_scored() -> None:
    scores = np.full((2, 3), 1 / 3)
    for arguments, message in (
        ((scores, [0, 3], ["a", "b"]), r"case 1 \(slide b\) has label 3; expected 0 to 2"),
        ((scores, [0, -1], ["a", "b"]), "label -1"),
        ((scores, [0], ["a"]), "1 labels and 1 slides"),
        ((scores * np.nan, [0, 1], ["a", "b"]), "not finite"),
        ((scores, [0, 1], ["a", "a"]), "slide a has patches of several labels: 0 and 1"),
        ((scores[:0], [], []), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictions(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'foo' is not supported"):
        compute_metrics(made_up(), ["foo"])


def test_confusion_matrix_as_a_picture(tmp_path: Path) -> None:
    counts = confusion_matrix(golden())
    assert counts.sum() == 40
    assert counts.shape == (3, 3)
    np.testing.assert_allclose(100 * np.trace(counts) / 40, PUBLISHED["all_metrics"]["accuracy"])
    file = tmp_path / "confusion.png"
    save_figure(confusion_figure(counts, ["well", "moderately", "poorly"]), file)
    image = np.asarray(Image.open(file).convert("RGB"))
    assert min(image.shape[:2]) > 300
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10

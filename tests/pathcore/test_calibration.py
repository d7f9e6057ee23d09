from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from pathcore import stats
from pathcore.calibration import confidences, reliability_figure


def scikit_learn_error(correct: Any, confidence: Any) -> float:
    """The weighted gap of scikit-learn's curve; the sizes of its bins are counted here."""
    rate, mean = calibration_curve(correct, confidence, n_bins=stats.CALIBRATION_BINS)
    edges = np.linspace(0, 1, stats.CALIBRATION_BINS + 1)
    inside = (confidence[:, None] > edges[:-1]) & (confidence[:, None] <= edges[1:])
    inside[confidence == 0, 0] = True
    sizes = inside.sum(axis=0)
    return float((np.abs(rate - mean) * sizes[sizes > 0]).sum() / len(confidence))


@given(seed=st.integers(0, 9999), count=st.integers(2, 60), digits=st.integers(1, 6))
def test_the_error_is_that_of_scikit_learns_curve(seed: int, count: int, digits: int) -> None:
    """Probabilities on the edges of bins, 0 and 1 included."""
    generator = np.random.default_rng(seed)
    confidence = np.round(generator.random(count), digits)
    correct = generator.random(count) < confidence
    correct[:2] = [True, False]  # scikit-learn wants both
    found = stats.calibration_error(correct, confidence)
    assert found == pytest.approx(scikit_learn_error(correct, confidence), abs=1e-12)


def test_a_calibrated_classifier_has_no_error_and_a_sure_one_has() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 200_000)
    correct = generator.random(200_000) < confidence
    assert stats.calibration_error(correct, confidence) < 0.005
    sure = np.full(200_000, 0.99)
    expected = 0.99 - correct.mean()
    assert stats.calibration_error(correct, sure) == pytest.approx(expected)


def test_confidence_is_that_of_the_predicted_class_or_of_each_label() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    confidence, correct = confidences(np.array([1, 2]), probabilities)
    assert confidence.tolist() == [0.5, 0.6] and correct.tolist() == [True, False]
    several = np.array([[0, 1, 1], [1, 0, 0]])
    confidence, correct = confidences(several, probabilities)
    assert confidence is probabilities and correct.tolist() == several.astype(bool).tolist()


def test_the_figure_shows_what_came_true() -> None:
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 4)
    labels = np.array([0] * 8 + [1] * 2 + [1] * 1 + [0] * 3)
    figure = reliability_figure(labels, probabilities, "14 cases")
    upper, lower = figure.axes
    points = upper.containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[0.7, 0.25], [0.9, 0.8]])
    error = stats.calibration_error(*reversed(confidences(labels, probabilities)))
    assert upper.texts[0].get_text() == f"ECE {error:.3f}"
    assert error == pytest.approx((4 * 0.45 + 10 * 0.1) / 14)
    heights = [patch.get_height() for patch in lower.patches]
    assert sum(heights) == 14 and sorted(heights)[-2:] == [4, 10]

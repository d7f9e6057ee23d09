from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_1samp

from cite.splits import draw_slides, slide_id
from cite.sweep import Cell, Sweep, estimate


def made_up() -> Sweep:
    scores = {Cell("zeroshot", 0, 0): 40.0}
    for seed in range(3):
        for number in (1, 4):
            scores[Cell("cite", number, seed)] = 70.0 + number + seed
            scores[Cell("linear", number, seed)] = 60.0 + number + 2 * seed
    del scores[Cell("linear", 4, 2)]
    return Sweep(scores)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_interval_is_students(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    if np.std(values) > 1e-6:
        interval = ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(interval)


def test_table_with_advantages() -> None:
    lines = made_up().table("cite").splitlines()
    assert lines[0] == "| method | 1 slide | 4 slides |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *("| zeroshot", "| cite", "| linear", "| cite minus zeroshot", "| cite minus linear"),
    ]
    assert lines[2] == "| zeroshot | 40.0 | 40.0 |"
    assert lines[3] == "| cite | 72.0 [69.5, 74.5] | 75.0 [72.5, 77.5] |"
    # By seed: 10, 9, 8; of four slides the last seed has no partner.
    assert lines[6].startswith("| cite minus linear | 9.0 [6.5, 11.5] | 9.5 [")


def test_missing_cells_leave_a_gap() -> None:
    sweep = made_up()
    assert sweep.estimate("nothing", 1) is None
    assert Sweep({Cell("a", 1, 0): 1.0, Cell("b", 2, 0): 2.0}).table().splitlines()[2:] == [
        *("| a | 1.0 | - |", "| b | - | 2.0 |"),
    ]
    with pytest.raises(ValueError, match="no runs"):
        estimate([])


def test_a_method_without_training_is_compared_with_every_seed() -> None:
    sweep = made_up()
    assert sweep.advantage("zeroshot", "cite", 1) == estimate([-31.0, -32.0, -33.0])
    assert sweep.advantage("cite", "zeroshot", 1) == estimate([31.0, 32.0, 33.0])
    # A trained method of which one seed is finished has no score of the other seeds.
    one = Sweep({c: s for c, s in sweep.scores.items() if c.method == "cite" or c.seed == 1})
    assert str(one.advantage("cite", "linear", 1)) == "9.0"


def test_curve_is_drawn(tmp_path: Path) -> None:
    made_up().draw(tmp_path / "curve.png", "accuracy, %", "made up")
    image = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert min(image.shape[:2]) > 400
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} & colours


def test_fewer_slides_are_a_part_of_more() -> None:
    train = [(f"{c}s{s}_{p}.jpg", c) for c in range(3) for s in range(6) for p in range(2)]
    few, more = (draw_slides(train, number, seed=3) for number in (2, 4))
    assert set(few) < set(more)
    assert len({slide_id(name) for name, _ in few}) == 6
    assert draw_slides(train, 2, seed=4) != few
    with pytest.raises(ValueError, match="class 0 has 6 slides; 7 are to be drawn"):
        draw_slides(train, 7)
    with pytest.raises(ValueError, match="num_slides is 0"):
        draw_slides(train, 0)

"""Every job of the growth benchmark runs, and its table gives the time for further items."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import growth
from benchmarks.growth import JOBS, Growth, draw, measure, table


@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_at_a_small_size(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_SLIDE_PX", 768)
    found = measure(job, 40, tmp_path)
    assert found.size == 40
    assert 0 < found.cpu_s < 120
    assert 10 < found.peak_mib < 10_000


def test_one_caption_in_twenty_repeats_another() -> None:
    captions = list(growth.captions(2000))
    assert len(captions) == 2000
    assert len(set(captions)) == 1900
    assert all(25 <= len(caption.split()) <= 45 for caption in captions)


def test_the_table_gives_the_time_for_each_further_item() -> None:
    """The median of the rounds: a round's times are compared with those of the same round."""
    rounds = [(1.0, 2.5), (2.0, 3.0), (1.5, 5.5)]
    found = [
        Growth("score", size, cpu_s, cpu_s, 50)
        for times in rounds
        for size, cpu_s in zip((100, 1100), times, strict=True)
    ]
    assert "1500.0 (1000.0 to 4000.0)" in table(found)
    assert table(found).count("score") == 2


def test_curves_are_drawn(tmp_path: Path) -> None:
    found = [Growth("score", size, size / 50, size / 60, 50) for size in (100, 400, 1600)]
    draw(found, tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").width > 1000

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathcore.rows import write_rows
from xtuner_add.demo.pathgen import dataset
from xtuner_add.demo.pathgen.dataset import _even_step, exchange_captions
from xtuner_add.demo.stages import read_jsonl


@given(st.integers(1, 5000))
def test_the_step_of_the_exchange_visits_every_place(count: int) -> None:
    step = _even_step(count)
    assert len({index * step % count for index in range(count)}) == count


def test_exchanged_captions_tell_nothing_of_the_image(tmp_path: Path) -> None:
    """Whatever an image's caption was, the dealt ones have the shares of the whole."""
    shares = {"fat": 60, "glands": 30, "mucin": 90}
    texts = [text for text, count in shares.items() for _ in range(count)]
    rows = [{"id": f"p{i:03d}", "caption": text} for i, text in enumerate(texts)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    exchange_captions(tmp_path / "pairs.jsonl", tmp_path / "exchanged.jsonl")
    dealt = {row["id"]: row["caption"] for row in read_jsonl(tmp_path / "exchanged.jsonl")}
    assert set(dealt) == {row["id"] for row in rows}
    for text, count in shares.items():
        given_to = Counter(dealt[row["id"]] for row in rows if row["caption"] == text)
        for other, whole in shares.items():
            assert given_to[other] == pytest.approx(count * whole / len(rows), abs=2)


def test_names_of_patches() -> None:
    assert dataset.parse_patch_name("archive_01_128_64") == ("archive_01", 128, 64)

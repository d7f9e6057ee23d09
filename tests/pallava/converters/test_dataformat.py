from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallava.converters.dataformat import choose, dataformat, load_instructions
from pallava.text.encoding import check_row
from tests.pallava.converters.published import read_lines, save_image, write_lines


def pair(number: int) -> dict[str, object]:
    return {"id": f"p{number}", "image": f"{number}.png", "caption": f"Caption {number}."}


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(9)), part_rows=st.integers(1, 10), seed=st.integers(0, 99))
def test_requests_depend_on_seed_and_id_alone(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], part_rows: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("dataformat")
    options = dict(seed=seed, image_position="random", max_area_px=None)
    results = []
    for name, numbers, size in (("plain", range(9), 100), ("other", order, part_rows)):
        pairs = write_lines(folder / f"{name}.jsonl", [pair(number) for number in numbers])
        dataformat(pairs, folder / name, part_rows=size, **options)  # type: ignore[arg-type]
        rows = read_lines(folder / name / "conversations.jsonl")
        results.append({row["id"]: row["conversations"] for row in rows})
        assert [row["id"] for row in rows] == [f"p{number}" for number in numbers]
        assert not any(map(check_row, rows))
    assert results[0] == results[1]


def test_choices_are_even() -> None:
    counts = Counter(choose("abcd", 0, str(number)) for number in range(4000))
    assert min(counts.values()) > 900 and max(counts.values()) < 1100
    other = sum(choose("abcd", 0, str(n)) != choose("abcd", 1, str(n)) for n in range(4000))
    assert 2800 < other < 3200


def test_pairs_of_the_published_form(tmp_path: Path) -> None:
    save_image(tmp_path / "a.b.png")
    save_image(tmp_path / "big.png", (9, 9))
    rows = [{"image": "a.b.png", "caption": " Gland. "}, {"image": "big.png", "caption": "Large."}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    report = dataformat(tmp_path / "pairs.json", tmp_path / "out", max_area_px=80)
    assert report["num_excluded"] == 1 and report["num_skipped"] == 0
    (row,) = read_lines(tmp_path / "out" / "conversations.jsonl")
    assert row["id"] == "a.b" and row["image"] == "a.b.png"
    request, answer = row["conversations"]
    assert request["value"].removeprefix("<image>\n") in load_instructions()
    assert answer == {"from": "gpt", "value": "Gland."}


def test_provenance_is_kept_and_bad_pairs_are_recorded(tmp_path: Path) -> None:
    rows = [{**pair(number), "source": "PMC-OA", "pmcid": "PMC1"} for number in range(20)]
    for row in rows:
        save_image(tmp_path / str(row["image"]))
    (tmp_path / "3.png").write_bytes(b"no image")
    rows[4]["image"] = "../4.png"
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match="more than 5%"):
        dataformat(pairs, tmp_path / "strict", max_skipped_fraction=0.05)
    report = dataformat(pairs, tmp_path / "out")
    assert report["num_rows"] == 18 and report["num_skipped"] == 2
    row = read_lines(tmp_path / "out" / "conversations.jsonl")[0]
    assert (row["source"], row["pmcid"]) == ("PMC-OA", "PMC1")


def test_instructions_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("One?\n\n Two? \n")
    assert load_instructions(tmp_path / "own.txt") == ["One?", "Two?"]
    (tmp_path / "own.json").write_text('["One?", 2]')
    with pytest.raises(ValueError, match="list of requests"):
        load_instructions(tmp_path / "own.json")
    assert len(set(load_instructions())) == len(load_instructions()) > 20

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallava.converters.cleaning.keywords import load_rule
from pallava.converters.cleaning.run import clean
from pallava.converters.cleaning.steps import (
    Step,
    index_step,
    keyword_step,
    read_index,
    size_step,
    words_step,
)
from pallava.converters.parts import Shard
from tests.pallava.converters.published import CAPTION, read_lines, save_image, write_lines

TEXTS = (
    CAPTION,
    "Too short.",
    f"Mice and rats only. {CAPTION.replace('patient', 'animal')}",
    "Chest radiograph " + "word " * 30,
    f"{CAPTION} <script>alert(1)</script>",
)


def default_steps() -> list[Step]:
    return [
        words_step(),
        keyword_step("pathology", load_rule("pathology")),
        keyword_step("human", load_rule("human")),
        size_step(max_area_px=100),
    ]


def write_pairs(folder: Path, texts: list[str], big: tuple[int, ...] = ()) -> Path:
    rows = []
    for number, text in enumerate(texts):
        save_image(folder / "images" / f"i{number}.png", (20, 20) if number in big else (4, 4))
        rows.append({"id": f"p{number}", "image": f"images/i{number}.png", "caption": text})
    return write_lines(folder / "pairs.jsonl", rows)


def test_counts_samples_and_files(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [*TEXTS, *[CAPTION] * 8], big=(7, 8))
    report = clean(pairs, tmp_path / "out", default_steps(), num_samples=1)
    assert report is not None
    table = [(step["name"], step["seen"], step["dropped"]) for step in report["steps"]]
    assert table == [("words", 13, 1), ("pathology", 12, 1), ("human", 11, 1), ("size", 10, 2)]
    assert report["num_kept"] == 8 and report["num_skipped"] == 0
    kept = read_lines(tmp_path / "out" / "pairs.jsonl")
    assert [row["id"] for row in kept] == ["p0", "p4", "p5", "p6", "p9", "p10", "p11", "p12"]
    dropped = {row["id"]: row for row in read_lines(tmp_path / "out" / "dropped.jsonl")}
    assert dropped["p2"]["step"] == "human" and dropped["p2"]["reason"] == "holds 'mice'"
    assert dropped["p7"]["reason"] == "20 x 20 px"
    assert [len(step["samples"]) for step in report["steps"]] == [1, 1, 1, 1]
    assert "| size | 10 | 2 | 20.0% | 0 |" in (tmp_path / "out" / "cleaning.md").read_text()
    assert clean(pairs, tmp_path / "out", default_steps(), num_samples=1) == report


def test_page_shows_images_and_runs_nothing(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [*TEXTS, *[CAPTION] * 8])
    clean(pairs, tmp_path / "out", [keyword_step("none", load_rule("human")), words_step(60)])
    page = (tmp_path / "out" / "cleaning.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 10
    assert "&lt;script&gt;alert" in page and "<script" not in page


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9),
    part_rows=st.integers(1, 5),
    shards=st.integers(1, 3),
)
def test_sharding_and_parts_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part_rows: int, shards: int
) -> None:
    folder = tmp_path_factory.mktemp("clean")
    pairs = write_pairs(folder, texts)
    options: dict[str, Any] = dict(num_samples=2)
    clean(pairs, folder / "one", default_steps(), part_rows=100, **options)
    for index in range(shards):
        shard = Shard(index, shards)
        clean(pairs, folder / "many", default_steps(), part_rows=part_rows, shard=shard, **options)
    clean(pairs, folder / "many", default_steps(), part_rows=part_rows, **options)

    def outcome(out: Path) -> list[Any]:
        report = json.loads((out / "cleaning.json").read_bytes())
        del report["inputs"]
        dropped = sorted(read_lines(out / "dropped.jsonl"), key=lambda row: row["id"])
        page = (out / "cleaning.html").read_text()
        return [report, dropped, page, (out / "pairs.jsonl").read_bytes()]

    assert outcome(folder / "one") == outcome(folder / "many")


@given(texts=st.lists(st.sampled_from(TEXTS), max_size=6), order=st.permutations(range(3)))
def test_the_order_of_steps_does_not_change_what_is_kept(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], order: list[int]
) -> None:
    from pallava.converters.cleaning.steps import Candidate

    def kept(steps: list[Step]) -> list[Any]:
        left = [Candidate({"id": n, "caption": text}, ()) for n, text in enumerate(texts)]
        for step in steps:
            left = [c for c, v in zip(left, step(left), strict=True) if v is None]
        return [candidate.row["id"] for candidate in left]

    steps = default_steps()[:3]
    assert kept(steps) == kept([steps[number] for number in order])


def test_unreadable_rows_are_recorded(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [CAPTION] * 30)
    (tmp_path / "images" / "i3.png").write_bytes(b"no image")
    with pairs.open("ab") as file:
        row = {"id": "out", "image": "../secret.png", "caption": CAPTION, "x": "\ud800"}
        file.write(json.dumps(row).encode() + b"\nno json\n")
    report = clean(pairs, tmp_path / "out", default_steps(), max_skipped_fraction=0.2)
    assert report is not None and report["num_kept"] == 29 and report["num_skipped"] == 3
    assert report["steps"][3]["unusable"] == 1
    skipped = [row["id"] for row in read_lines(tmp_path / "out" / "skipped_samples.jsonl")]
    assert skipped == ["out", "row 32", "p3"]
    with pytest.raises(ValueError, match="more than 5%"):
        clean(pairs, tmp_path / "strict", default_steps(), max_skipped_fraction=0.05)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "i1.png\n\nimages/i3\nunknown\n"),
        ("list.csv", "n,image\n0,i1.png\n1,images/i3.png\n2,unknown\n"),
        ("one_column.csv", "which\ni1\np3\nunknown\n"),
        ("list.json", '["i1", {"image": "i3.png"}, {"id": "unknown"}]'),
        ("sets.json", '{"pmc_oa": ["i1.png", "p3"], "quilt": ["unknown"]}'),
        ("list.jsonl", '{"id": "p1"}\n"i3.png"\n"unknown"\n'),
        ("no_header.csv", "i1.png\np3\nunknown\n"),
        ("folders.txt", "PMC_OA/images/i1.png\nPMC_OA/images/i3\nunknown\n"),
    ],
)
def test_published_indices(tmp_path: Path, name: str, content: str) -> None:
    pairs = write_pairs(tmp_path, [CAPTION] * 5, big=(3,))
    (tmp_path / name).write_text(content)
    report = clean(pairs, tmp_path / "out", [size_step(100)], index=read_index(tmp_path / name))
    assert report is not None and report["index"] == {"num_entries": 3, "num_missing": 1}
    assert (tmp_path / "out" / "index_missing.txt").read_text() == "unknown\n"
    assert [row["id"] for row in read_lines(tmp_path / "out" / "pairs.jsonl")] == ["p1"]


def test_an_index_of_other_images_is_an_error(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [CAPTION] * 5)
    index = frozenset({"other/i1.jpg", "i9.png"})
    with pytest.raises(ValueError, match=r"index: names none of the rows; it has 'i9\.png'"):
        clean(pairs, tmp_path / "out", [size_step(100)], index=index)


def test_an_index_that_names_nothing(tmp_path: Path) -> None:
    for name, content in (("a.json", "[{}]"), ("b.json", "{"), ("c.txt", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"index .*{name}"):
            read_index(tmp_path / name)


def test_conversations_are_judged_by_caption_or_by_what_is_said(tmp_path: Path) -> None:
    def row(number: int, answer: str, **about: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer}]
        return {"id": number, "conversations": turns, **about}

    rows = [row(1, "A mouse"), row(2, "A gland"), row(3, "A gland", caption="Liver of mice")]
    path = write_lines(tmp_path / "conversations.jsonl", rows)
    report = clean(path, tmp_path / "out", [keyword_step("human", load_rule("human"))])
    assert report is not None and report["num_kept"] == 1
    assert read_lines(tmp_path / "out" / "conversations.jsonl") == [rows[1]]


def test_steps_must_differ(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [CAPTION])
    for steps in ([], [words_step(), words_step(3)]):
        with pytest.raises(ValueError, match="at least one step"):
            clean(pairs, tmp_path / "out", steps)
    with pytest.raises(ValueError, match="at least one step"):
        index = frozenset({"p0"})
        clean(pairs, tmp_path / "out", [index_step(index)], index=index)


def test_no_output_replaces_another_or_the_input(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path, ["a gland " * 20, "short"])
    content = rows.read_bytes()
    with pytest.raises(ValueError, match=r"pairs\.jsonl: would be replaced .* name another OUT"):
        clean(rows, tmp_path, [words_step(20)], image_folder=tmp_path)
    assert rows.read_bytes() == content and not (tmp_path / "cleaning.json").exists()
    for name in ("dropped.jsonl", "skipped_samples.jsonl"):
        again = rows.rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: the rows that are kept .* copy the file"):
            clean(again, tmp_path / "out", [words_step(20)], image_folder=tmp_path)
        rows = again


def test_conversations_need_no_id(tmp_path: Path) -> None:
    texts = [["Is it red?", "yes"], ["Is it red?", "yes, " * 30]]
    turns = [
        [{"from": "human", "value": asked}, {"from": "gpt", "value": said}] for asked, said in texts
    ]
    rows = tmp_path / "conversations.jsonl"
    rows.write_text("".join(json.dumps({"conversations": each}) + "\n" for each in turns))
    report = clean(rows, tmp_path / "out", [words_step(20)])
    assert report is not None and report["num_kept"] == 1
    kept = [json.loads(line) for line in (tmp_path / "out" / rows.name).open()]
    assert [row["id"] for row in kept] == ["2"]

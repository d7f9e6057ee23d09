"""Filters drop and keep the right captions, and count them."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st

from pathgen.filters import (
    FilterStep,
    StepCount,
    count_words,
    exact_step,
    filter_captions,
    find_leak,
    find_refusal,
    leak_step,
    length_step,
    loop_step,
    markup_step,
    near_step,
    refusal_step,
)
from tests.pathgen.conftest import patch_rows, read_rows, write_rows


def sift(folder: Path, steps: list[FilterStep], rows: list[Any], **settings: Any) -> Any:
    source = write_rows(folder / "in.jsonl", rows)
    counts = filter_captions(source, folder / "out.jsonl", steps, progress=False, **settings)
    return counts, [row["id"] for row in read_rows(folder / "out.jsonl")]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m unable to determine the diagnosis.",
        "As an AI language model, I do not see images.",
        "I cannot provide a diagnosis from this image.",
        "No image was provided. Please upload one.",
        "Please consult a qualified professional.",
        "The provided image is not a histopathology of the cervix but a photograph.",
        "Since the image provided is not of a microscopic sample, nothing can be said.",
        "The image provided does not contain any cells or tissues.",
    ],
)
def test_refusals(text: str) -> None:
    assert find_refusal(text)


def test_broken_generations_are_dropped(tmp_path: Path) -> None:
    rows = patch_rows(
        "Dense stroma.<|im_end|>",
        "Is it a gland?</think> Dense stroma.",
        "Dense stroma [/INST] with vessels.",  # as in PathGen-1.6M
        "stroma " * 200,
        "Round nuclei, small cells. " * 5,
        "Dense, dense, dense stroma with nuclei of 5 µm and < 3 mitoses.",
    )
    counts, kept = sift(tmp_path, [markup_step(), loop_step()], rows)
    assert kept == ["p5"]
    assert [count.dropped for count in counts] == [0, 3, 2]


@pytest.mark.parametrize(
    "text",
    [
        "Considering the additional description, this is a carcinoma.",
        "Based on the given description the tissue is colonic.",
        "The provided clinical information suggests lymphoma.",
        "According to the report, necrosis is extensive.",
        "As described in the notes, giant cells are seen.",
        "The description mentions mitoses, which are not visible.",
        "Unlike your description, no atypia is seen.",
        "No overt pathological changes are evident from the description provided.",
        "This description points to a healthy breast.",
        "Consistent with the clinical information provided.",
        "An adenocarcinoma, especially given the clinical context of bleeding.",
    ],
)
def test_leaks(text: str) -> None:
    assert find_leak(text)


@pytest.mark.parametrize(
    "text",
    [
        "The nuclei are described as vesicular, with additional smaller cells.",
        "Given the nuclear detail, a high grade is likely.",
        "Additional findings include perineural invasion and necrosis.",
        "The cells cannot be separated from the surrounding stroma.",
        "The architecture suggests that mitoses are frequent; the pattern indicates sarcoma.",
        "Image of the colon with crypts; the AI node is free.",
        "No diagnosis is given without signs of malignancy; type I pneumocytes are seen.",
        "No abnormalities are evident from the described morphology in the given field of view.",
        "Confirmation requires the clinical context and further stains.",
        "The image does not show necrosis and is not diagnostic.",
        "The tissue image reveals dense cellular infiltration, suggesting inflammation.",
        "Based on the architecture and the cytology, this is a carcinoma.",
    ],
)
def test_plain_captions_stay(text: str) -> None:
    assert find_refusal(text) is None
    assert find_leak(text) is None


def test_words() -> None:
    assert count_words("High-grade tumour; N/C ratio is 2.") == 6


def test_each_step_sees_what_the_ones_before_kept(tmp_path: Path) -> None:
    rows = [
        "{broken", {"id": "none"}, {"id": "blank", "caption": " "},
        *patch_rows("too short", "I'm sorry, but this is not clear to me",
                    "Based on the given description a tumour is seen",
                    "A tumour of small round blue cells is seen",
                    "a TUMOUR of small, round blue cells is seen."),
    ]  # fmt: skip
    steps = [length_step(4, 20), refusal_step(), leak_step(), exact_step()]
    counts, kept = sift(tmp_path, steps, rows)
    assert kept == ["p3"]
    assert [(c.name, c.seen, c.dropped) for c in counts] == [
        ("readable", 8, 3), ("length", 5, 1), ("refusal", 4, 1), ("leak", 3, 1), ("exact", 2, 1),
    ]  # fmt: skip
    dropped = read_rows(tmp_path / "out.dropped.jsonl")
    assert [(row["line"], row["step"]) for row in dropped] == [
        (1, "readable"), (2, "readable"), (3, "readable"), (4, "length"), (5, "refusal"),
        (6, "leak"), (8, "exact"),
    ]  # fmt: skip
    assert dropped[-1]["reason"] == "as in p3"
    summary = json.loads((tmp_path / "out.filters.json").read_text())
    assert (summary["rows"], summary["kept"]) == (8, 1)
    assert summary["steps"][1]["samples"][0]["caption"] == "too short"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"none of 0 rows can be used$"),
        ('{"caption": "Glands."}\n' * 3, r"none of 3 rows can be used: id: expected text"),
        ('{"id": "a", "caption": "Glands."}\n', r"no row has the field 'slide', within which"),
    ],
)
def test_a_wrong_file_or_field_leaves_no_output(tmp_path: Path, content: str, message: str) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        filter_captions(source, out, [exact_step("slide"), near_step("slide")])
    assert not out.exists()


def test_duplicates_may_be_sought_within_slides(tmp_path: Path) -> None:
    rows = patch_rows(*["The same tumour cells in the same stroma"] * 4)
    for row, slide in zip(rows, "aabb", strict=True):
        row["wsi_id"] = slide
    for make in (exact_step, near_step):
        assert sift(tmp_path, [make()], rows)[1] == ["p0"]
        assert sift(tmp_path, [make("wsi_id")], rows)[1] == ["p0", "p2"]


WORDS = [f"word{number}" for number in range(500)]


def test_near_duplicates_by_their_true_similarity(tmp_path: Path) -> None:
    draw = random.Random(0)
    captions = []
    for _ in range(40):
        words = draw.choices(WORDS, k=60)
        captions.append(" ".join(words))
        captions.append(" ".join([*words[:58], *draw.choices(WORDS, k=2)]))  # 56 of 60 in common
        captions.append(" ".join([*words[:30], *draw.choices(WORDS, k=30)]))  # 28 of 88
    _, kept = sift(tmp_path, [near_step(threshold=0.7, num_perm=256)], patch_rows(*captions))
    kinds = [int(name[1:]) % 3 for name in kept]
    assert kinds.count(0) == 40
    assert kinds.count(1) <= 1
    assert kinds.count(2) >= 39


def test_near_duplicates_are_those_of_datasketchs_own_tables(tmp_path: Path) -> None:
    draw = random.Random(1)
    captions = [" ".join(draw.choices(WORDS[:60], k=40)) for _ in range(30)]
    for _ in range(270):
        words = draw.choice(captions).split()
        for _ in range(draw.randrange(4)):
            words[draw.randrange(40)] = draw.choice(WORDS)
        captions.append(" ".join(words))

    lsh, kept, reasons = MinHashLSH(threshold=0.8, num_perm=128), {}, {}
    for number, caption in enumerate(captions):
        sketch, words = MinHash(num_perm=128), caption.split()
        for at in range(len(words) - 2):
            sketch.update(f"\0{' '.join(words[at : at + 3])}".encode())
        found = [(sketch.jaccard(kept[name]), -int(name[1:])) for name in lsh.query(sketch)]
        likeness, index = max(found, default=(0.0, 0))
        if likeness >= 0.8:
            reasons[f"p{number}"] = f"{likeness:.2f} like p{-index}"
        else:
            kept[f"p{number}"] = sketch
            lsh.insert(f"p{number}", sketch)

    assert sift(tmp_path, [near_step()], patch_rows(*captions))[1] == list(kept)
    dropped = read_rows(tmp_path / "out.dropped.jsonl")
    assert {row["id"]: row["reason"] for row in dropped} == reasons
    assert len(reasons) > 50


def test_near_duplicates_take_little_memory() -> None:
    draw, step = random.Random(0), near_step()
    rows = [{"id": f"{i}", "caption": " ".join(draw.choices(WORDS, k=35))} for i in range(600)]
    for row in rows[:300]:  # the step's tables grow in leaps
        step.fault(row)
    tracemalloc.start()
    for row in rows[300:]:
        step.fault(row)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / 300 < 3_000


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(0, 3))
def test_nothing_is_lost(texts: list[str], num_samples: int) -> None:
    import tempfile

    # A file without any usable caption is an error.
    texts = ["Glands.", *(text.encode(errors="replace").decode() for text in texts)]
    steps = [length_step(1, 5), exact_step()]
    with tempfile.TemporaryDirectory() as folder:
        counts, kept = sift(Path(folder), steps, patch_rows(*texts), num_samples=num_samples)
        dropped = read_rows(Path(folder) / "out.dropped.jsonl")
    assert sorted([*kept, *(row["id"] for row in dropped)]) == sorted(
        f"p{number}" for number in range(len(texts))
    )
    check: list[StepCount] = counts
    assert sum(count.dropped for count in check) == len(dropped)
    assert all(len(count.samples) == min(num_samples, count.dropped) for count in check)
    assert all(a.seen - a.dropped == b.seen for a, b in itertools.pairwise(check))


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minimum <= maximum"):
        length_step(9, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        near_step(threshold=1.5)
    source = write_rows(tmp_path / "in.jsonl", [])
    with pytest.raises(ValueError, match="would replace"):
        filter_captions(source, source, [])
    with pytest.raises(FileNotFoundError):
        filter_captions(tmp_path / "absent.jsonl", source, [])


def test_signs_of_markers_are_no_punctuation() -> None:
    opposite = ("Tumour cells are ER+, PR+ and HER2-.", "Tumour cells are ER-, PR- and HER2+.")
    rows = [{"id": str(number), "caption": text} for number, text in enumerate(opposite)]
    rows.append({"id": "2", "caption": "tumour cells are ER+ PR+ and HER2-"})
    fault = exact_step().fault
    assert [fault(row) for row in rows] == [None, None, "as in 0"]

"""PathMMU, Quilt-VQA and SlideBench: made-up files of the published form, with users' mess."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pallava.evaluation.benchmarks import resized
from pallava.evaluation.report import write_report
from pallava.records.questions import NO_IMAGES, FileImage, SlideFeatures
from pallava.registry import EVALUATIONS


def save_image(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 100, 150)).save(path)
    return path.name


def pathmmu_row(number: int, answer: str = "B) oedema (mild)", **changes: Any) -> dict[str, Any]:
    return {
        "No": number,
        "img": f"{number:x}f.jpg",
        "question": "Which change dominates?",
        "options": ["A) fibrosis", "B) oedema (mild)", "C: necrosis"],
        "answer": answer,
        "explanation": "Pale spaces.",
        **changes,
    }


@pytest.fixture
def pathmmu(tmp_path: Path) -> Path:
    """Two subsets, one with a level more; images of SocialPath are mostly gone."""
    rows = [pathmmu_row(1), pathmmu_row(2, "C"), pathmmu_row(2, "oedema (mild)", img="3f.jpg")]
    data = {
        "PubMed": {"val": [pathmmu_row(9)], "test": rows, "test_tiny": [pathmmu_row(1)]},
        "SocialPath": {"test": [pathmmu_row(number, img=f"gone{number}.jpg", tw_id="1")
                                for number in range(6)], "test_tiny": []},
        "PathCLS": {"MHIST": {"test": [pathmmu_row(1, img="3f.jpg")]},
                    "BACH": {"test_tiny": [pathmmu_row(1, img="3f.jpg")]}},
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data))
    for name in ("1f.jpg", "2f.jpg", "3f.jpg", "9f.jpg"):
        save_image(tmp_path / "images" / name)
    return tmp_path


def test_pathmmu_is_read_with_its_denominators(pathmmu: Path) -> None:
    made = EVALUATIONS.get("pathmmu")(pathmmu, split="all")
    ids = [question.id for question in made.questions.questions]
    assert ids == ["PubMed/test/1", "PubMed/test/2", "PubMed/test/2-2", "PubMed/test_tiny/1",
                   "PathCLS/MHIST/test/1", "PathCLS/BACH/test_tiny/1"]  # fmt: skip
    assert [question.answer for question in made.questions.questions] == list("BCBBBB")
    first, *_, last = made.questions.questions
    assert first.options == {"A": "fibrosis", "B": "oedema (mild)", "C": "necrosis"}
    assert first.cluster == "1f.jpg"
    assert last.groups == {"subset": "PathCLS", "split": "test_tiny", "source": "BACH"}
    assert made.questions.totals == {"PubMed": 4, "SocialPath": 6, "PathCLS": 2}
    assert len(made.questions.skipped) == 6

    replies = dict(zip(ids, ["B", "(C)", "(B)", "no idea", "Oedema (mild).", "(A)"], strict=True))
    metrics = write_report(made, replies, made.questions.skipped, pathmmu / "out")
    assert metrics["coverage"]["SocialPath"] == {"asked": 0, "in the data": 6}
    assert metrics["scores"]["letters"]["accuracy"]["value"] == pytest.approx(100 * 4 / 6, abs=0.01)
    assert metrics["scores"]["letters"]["unreadable"] == 1
    assert metrics["published"]["pathmmu"]["filled in at random"] == 2
    assert metrics["by_subset"]["PathCLS"]["correct"]["value"] == 50
    tables = (pathmmu / "out" / "metrics.md").read_text()
    assert "| SocialPath | 0 | 6 |" in tables and "## By subset" in tables


def test_resized_images_leave_the_denominators(pathmmu: Path) -> None:
    made = EVALUATIONS.get("pathmmu")(pathmmu, split="all")
    small = resized(made, "shorter:4")
    assert small.questions.totals == made.questions.totals != {}
    assert small.questions.skipped == made.questions.skipped


def test_pathmmu_takes_subsets_splits_and_published_prompts(pathmmu: Path) -> None:
    make = EVALUATIONS.get("pathmmu")
    made = make(pathmmu / "data.json", split="val", subsets="pubmed", prompt="pathmmu-llava")
    (question,) = made.questions.questions
    assert question.text == (
        "Which change dominates?\n(A) fibrosis\n(B) oedema (mild)\n(C) necrosis\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    with pytest.raises(ValueError, match="'tiny': expected one of val, test, test_tiny"):
        make(pathmmu, split="tiny")
    with pytest.raises(ValueError, match="'Twitter': expected one of PubMed"):
        make(pathmmu, subsets="Twitter")
    with pytest.raises(ValueError, match=r"6 of 6 rows cannot be used"):
        make(pathmmu, split="test", subsets="SocialPath")
    assert len(make(pathmmu, NO_IMAGES, split="all").questions.questions) == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": ["A) one"]}, "2 to 8 texts"),
        ({"options": ["B) one", "A) two"]}, "option A is labelled"),
        ({"answer": "D) neither"}, "is neither a letter of A, B, C nor an option"),
        ({"question": " "}, "question: expected text"),
        ({"options": ["A) one", None]}, "option B: expected text, found None"),
        ({"options": ["A) one", ["B) two"]]}, "option B: expected text"),
        ({"options": {"A": "one"}}, "2 to 8 texts"),
    ],
)
def test_pathmmu_rows_that_cannot_be_used_are_named(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    rows = [pathmmu_row(1), pathmmu_row(2, **changes)]
    (tmp_path / "data.json").write_text(json.dumps({"Atlas": {"test_tiny": rows}}))
    made = EVALUATIONS.get("pathmmu")(tmp_path, NO_IMAGES)
    assert len(made.questions.questions) == 1
    (skipped,) = made.questions.skipped
    assert skipped.id == "Atlas/test_tiny/2" and reason in skipped.reason


@pytest.mark.parametrize("number", ["", None, "3/4"])
def test_pathmmu_rows_without_a_usable_number_are_counted(tmp_path: Path, number: Any) -> None:
    rows = [pathmmu_row(0), pathmmu_row(2) | {"No": number}]
    (tmp_path / "data.json").write_text(json.dumps({"PathCLS": {"BACH": {"test_tiny": rows}}}))
    made = EVALUATIONS.get("pathmmu")(tmp_path, NO_IMAGES)
    assert len({question.id for question in made.questions.questions}) == 2
    assert [dict(question.groups) for question in made.questions.questions] == [
        {"subset": "PathCLS", "split": "test_tiny", "source": "BACH"}
    ] * 2


def test_pathmmu_splits_are_lists(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"PubMed": {"test_tiny": None}}))
    with pytest.raises(ValueError, match="PubMed/test_tiny: expected a list of rows, found None"):
        EVALUATIONS.get("pathmmu")(tmp_path, NO_IMAGES)


QUILT = [
    {"id": 0, "image": "x7_0.jpg", "question": "Is mucin seen?", "answer": "Yes, at the edge.",
     "answer_type": "CLOSED", "yes_no_answer": "Yes"},
    {"id": 1, "image": "x7_0.jpg", "question": "What is shown?", "answer": "A gland.",
     "answer_type": "OPEN", "yes_no_answer": None},
    {"id": 2, "image": "x8_1.jpg", "question": "Why?", "answer": "Pressure.",
     "answer_type": "other"},
]  # fmt: skip


def quilt_files(root: Path, part: str = "quiltvqa") -> Path:
    (root / f"{part}_test_w_ans.json").write_text(json.dumps(QUILT))
    for name in ("x7_0.jpg", "x8_1.jpg", "plain_x7_0.jpg", "plain_x8_1.jpg"):
        save_image(root / "images" / name)
    for kind, prefix in (("red", ""), ("nored", "plain_")):
        name = f"{part.replace('red', kind)}_test_wo_ans.jsonl"
        lines = [
            {"question_id": row["id"], "image": f"{prefix}{row['image']}",
             "text": f"{row['question']} Say it in one word."}
            for row in QUILT
        ]  # fmt: skip
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def quilt_parquet(root: Path) -> Path:
    (root / "data").mkdir()
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    rows = [
        {**{key: row.get(key) for key in ("question", "answer", "answer_type")},
         "context": "...", "image": {"bytes": content.getvalue(), "path": None}}
        for row in QUILT
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "train-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("make", [quilt_files, quilt_parquet])
def test_quilt_vqa_is_read_in_every_form(tmp_path: Path, make: Any) -> None:
    made = EVALUATIONS.get("quilt-vqa")(make(tmp_path), prompt="short")
    closed, opened, other = made.questions.questions
    assert (closed.answer, closed.answer_type, opened.answer_type) == ("yes", "yes/no", "other")
    assert other.answer == "Pressure."
    assert closed.text == "Is mucin seen?\nAnswer with a single word, yes or no."
    assert closed.image is not None and closed.image.load()
    replies = {closed.id: "", opened.id: "A round gland", other.id: "Pressure"}
    metrics = write_report(made, replies, [], tmp_path / "out")
    published = metrics["published"]["quilt-vqa"]
    # The published rule takes silence for a yes; ours counts it wrong.
    assert published["closed, no or not, otherwise yes"] == 100
    assert published["closed answers that are empty, so yes"] == 1
    assert published["open recall"] == 100
    assert metrics["scores"]["closed (yes/no)"]["accuracy"]["value"] == 0
    assert metrics["scores"]["open"]["words per answer"] == 2


def test_red_circles_can_be_left_out(tmp_path: Path) -> None:
    make = EVALUATIONS.get("quilt-vqa-red")
    root = quilt_files(tmp_path, "quiltvqa_red")
    red = make(root).questions.questions
    plain = make(root, circle="no", prompt="published").questions.questions
    assert [question.image.name for question in red] == ["x7_0.jpg", "x7_0.jpg", "x8_1.jpg"]
    assert {question.image.name for question in plain} == {"plain_x7_0.jpg", "plain_x8_1.jpg"}
    assert plain[0].text == "Is mucin seen? Say it in one word."
    # The same cluster, so that both arms can be paired.
    assert [question.cluster for question in plain] == [question.cluster for question in red]
    with pytest.raises(ValueError, match="expected yes or no"):
        make(root, circle="red")
    (tmp_path / "hub").mkdir()
    with pytest.raises(ValueError, match="only in the JSON release"):
        make(quilt_parquet(tmp_path / "hub"), circle="no")


def test_a_broken_line_of_the_questions_costs_its_row_only(tmp_path: Path) -> None:
    asked = quilt_files(tmp_path, "quiltvqa_red") / "quiltvqa_nored_test_wo_ans.jsonl"
    *lines, _ = asked.read_text().splitlines()
    asked.write_text("\n".join([*lines, '{"question_id": 2, "ima']))
    made = EVALUATIONS.get("quilt-vqa-red")(tmp_path, circle="no")
    assert len(made.questions.questions) == 2
    (skipped,) = made.questions.skipped
    assert skipped.id == "2" and "no JSON" in skipped.reason


def test_a_closed_question_needs_yes_or_no(tmp_path: Path) -> None:
    rows = [*QUILT, {**QUILT[0], "id": 3, "answer": "Mucin.", "yes_no_answer": "maybe"}]
    (tmp_path / "quiltvqa_test_w_ans.json").write_text(json.dumps(rows))
    made = EVALUATIONS.get("quilt-vqa")(tmp_path, NO_IMAGES)
    (skipped,) = made.questions.skipped
    assert "yes_no_answer: expected yes or no" in skipped.reason and "maybe" in skipped.reason


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # Excel's byte order mark
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


TCGA = {"ID": "5", "Slide": "TCGA-XX-0001-01Z-00-DX1", "Tumor": "KIRC",
        "Broad Category": "diagnosis", "Narrow Category": "grading", "Question": "Which grade?",
        "A": "G1", "B": "G2", "C": "", "D": "", "Answer": " b "}  # fmt: skip


def test_slidebench_tcga_finds_features_and_pictures(tmp_path: Path) -> None:
    rows = [
        TCGA,
        {**TCGA, "Slide": "TCGA-XX-0001-01Z-00-DX2", "C": "G3", "Answer": "G3"},
        {**TCGA, "Slide": "TCGA-XX-0002-01Z-00-DX1.csv", "Answer": "B. G2"},
        {**TCGA, "Slide": "TCGA-XX-0003-01Z-00-DX1"},
    ]
    write_csv(tmp_path / "SlideBench-VQA-TCGA.csv", rows)
    slides = tmp_path / "slides"
    (slides / "KIRC").mkdir(parents=True)
    (slides / "KIRC" / "TCGA-XX-0001-01Z-00-DX1.h5").write_bytes(b"features")
    (slides / "TCGA-XX-0001-01Z-00-DX2.h5").write_bytes(b"features")
    save_image(slides / "KIRC" / "TCGA-XX-0002-01Z-00-DX1.png")
    made = EVALUATIONS.get("slidebench-tcga")(tmp_path, prompt="slidechat")
    first, second, third = made.questions.questions
    assert isinstance(first.image, SlideFeatures) and isinstance(second.image, SlideFeatures)
    assert isinstance(third.image, FileImage)
    assert [question.answer for question in made.questions.questions] == list("BCB")
    assert first.text == "Which grade?\nA. G1\nB. G2"
    assert first.cluster == second.cluster == "TCGA-XX-0001"  # two slides of one patient
    assert first.groups == {"tumor": "KIRC", "category": "diagnosis", "subcategory": "grading"}
    (skipped,) = made.questions.skipped
    assert "neither KIRC/TCGA-XX-0003-01Z-00-DX1.h5 nor a picture" in skipped.reason
    replies = {question.id: "B" for question in made.questions.questions}
    metrics = write_report(made, replies, made.questions.skipped, tmp_path / "out")
    assert metrics["groups"] == ["tumor", "category", "subcategory"]
    assert metrics["by_subcategory"]["grading"]["count"] == 3
    assert metrics["published"] == {}  # its authors published no scorer


def test_slidebench_bcnb_slides_are_numbers(tmp_path: Path) -> None:
    row = {"Slide": "12.0", "Task": "ER", "Question": "ER status?", "A": "positive",
           "B": "negative", "C": "nan", "D": "", "Answer": "negative", "Output": "A"}  # fmt: skip
    write_csv(tmp_path / "SlideBench-VQA-BCNB.csv", [row, {**row, "A": ""}])
    save_image(tmp_path / "slides" / "12.jpg")
    made = EVALUATIONS.get("slidebench-bcnb")(tmp_path)
    (question,) = made.questions.questions
    assert (question.id, question.answer, question.cluster) == ("bcnb-0", "B", "12")
    assert question.groups == {"task": "ER"}
    assert "at least two options" in made.questions.skipped[0].reason

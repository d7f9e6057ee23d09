"""Benchmarks in the forms in which they are published."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pallava.evaluation.image_digests import content_digest
from pallava.evaluation.metrics.classes import parse_class
from pallava.records.class_folders import (
    read_class_folders,
    read_class_records,
)
from pallava.records.containers import read_plain_pickle
from pallava.records.prompts import PROMPTS
from pallava.records.questions import NO_IMAGES
from pallava.records.readers import read_choices, read_vqa, strip_letter
from pathcore.image_sets import image_set_names, load_image_set


def save_image(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (value, 10, 10)).save(path)
    return path


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (value, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


RECORDS = {
    "7": {"question": "Is it red?", "image": "a.png", "answer": "yes",
          "question_type": "is it", "answer_type": "yes/no"},
    "8": {"question": "How many cells?", "image": "a", "answer": "12"},
}  # fmt: skip


def check_vqa(found: Any) -> None:
    first, second = found.questions
    assert (first.text, first.answer, first.answer_type) == ("Is it red?", "yes", "yes/no")
    assert (second.answer, second.answer_type) == ("12", "number")
    assert second.question_type == "how many"
    assert first.image.load().size == (20, 12)
    assert found.skipped == []


@pytest.mark.parametrize("form", ["object", "list", "jsonl", "pickle", "pickle of list"])
def test_pathvqa_is_read_in_every_form(tmp_path: Path, form: str) -> None:
    save_image(tmp_path / "images" / "a.png")
    rows = [{"question_id": key, **row} for key, row in RECORDS.items()]
    if form == "jsonl":
        path = tmp_path / "test.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    elif form.startswith("pickle"):
        path = tmp_path / "test.pkl"
        path.write_bytes(pickle.dumps(RECORDS if form == "pickle" else rows, protocol=2))
    else:
        path = tmp_path / "test.json"
        path.write_text(json.dumps(RECORDS if form == "object" else rows))
    found = read_vqa(path, None)
    check_vqa(found)
    assert [question.id for question in found.questions] == ["7", "8"]
    assert found.questions[0].question_type == "is it"


@pytest.mark.parametrize("as_folder", [True, False])
def test_pathvqa_parquet_keeps_images_in_the_file(tmp_path: Path, as_folder: bool) -> None:
    table = pa.Table.from_pylist(
        [
            {
                "image": {"bytes": png(value), "path": f"{value}.png"},
                "question": text,
                "answer": answer,
            }
            for value, (text, answer) in enumerate(
                [("Is it red?", "yes"), ("How many cells?", "12")]
            )
        ]
    )
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(table, path, row_group_size=1)
    pq.write_table(table.slice(0, 1), path.with_name("train-00000-of-00001.parquet"))
    found = read_vqa(tmp_path if as_folder else path, None)
    check_vqa(found)
    pixels = [question.image.load().getpixel((0, 0))[0] for question in found.questions]  # type: ignore
    assert pixels == [0, 1]
    assert len({question.image.identity(content_digest) for question in found.questions}) == 2  # type: ignore


@pytest.mark.parametrize(
    ("stated", "answer", "expected"),
    [
        ("yes/no", "left", "other"),  # published sets call a choice between two words yes/no
        ("yes/no", "3", "number"),
        ("yes/no", "No, it is normal", "yes/no"),
        ("CLOSED ", "Yes", "yes/no"),  # VQA-RAD
        ("CLOSED", "right", "other"),
        ("OPEN", "3", "number"),
        ("Other", "3", "other"),
        ("location", "liver", "other"),
    ],
)
def test_a_stated_answer_type_must_fit_the_answer(
    tmp_path: Path, stated: str, answer: str, expected: str
) -> None:
    save_image(tmp_path / "images" / "a.png")
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"7": RECORDS["7"] | {"answer": answer, "answer_type": stated}}))
    (question,) = read_vqa(path, None).questions
    assert question.answer_type == expected


def test_conversations_are_questions(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    path = tmp_path / "conversations.jsonl"
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps({"id": "r", "image": "a.png", "conversations": turns}))
    (question,) = read_vqa(path, None).questions
    assert (question.id, question.text, question.answer) == ("r", "Is it red?", "yes")


def test_bad_rows_are_recorded_and_many_are_an_error(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png")
    rows: dict[str, Any] = {str(number): dict(RECORDS["7"]) for number in range(30)}
    rows["31"] = {"question": "", "image": "a.png", "answer": "no"}
    rows["32"] = RECORDS["7"] | {"image": "absent.png"}
    rows["33"] = RECORDS["7"] | {"image": "../../etc/passwd"}
    path = tmp_path / "test.json"
    path.write_text(json.dumps(rows))
    found = read_vqa(path, None)
    assert len(found.questions) == 30
    reasons = {row.id: row.reason for row in found.skipped}
    assert "expected text" in reasons["31"]
    assert "no such image file" in reasons["32"]
    assert "resolves to a path outside the image folder" in reasons["33"]
    with pytest.raises(ValueError, match="33 of 33 rows cannot be used"):
        read_vqa(path, tmp_path / "elsewhere")


@pytest.mark.parametrize("scores", [{"age": [1.0]}, {"age": None}, {"age": "most"}])
def test_scored_answers_need_numbers(tmp_path: Path, scores: dict[str, Any]) -> None:
    save_image(tmp_path / "images" / "a.png")
    path = tmp_path / "test.json"
    scored = {"question": "Why?", "image": "a.png", "label": scores}
    path.write_text(json.dumps({"7": RECORDS["7"], "8": scored}))
    (skipped,) = read_vqa(path, None).skipped
    assert skipped.reason.startswith("label: expected a score by answer, found {'age'")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch hacked",)


def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test.pkl"
    path.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"wants to call .*system"):
        read_plain_pickle(path)
    assert not (tmp_path / "hacked").exists()
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(ValueError, match="not read as a pickle"):
        read_vqa(path, tmp_path)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


ROW = {"Figure_path": "a.png", "Question": "What is {seen}?", "Answer": "fibrosis",
       "Choice A": " A: necrosis", "Choice B": " B: fibrosis ", "Choice C": "C:fat",
       "Choice D": " D: none", "Answer_label": "B"}  # fmt: skip


@pytest.mark.parametrize("missing", [(), ("Answer_label",)])
def test_pmcvqa_csv_is_read(tmp_path: Path, missing: tuple[str, ...]) -> None:
    save_image(tmp_path / "a.png")
    row = {key: value for key, value in ROW.items() if key not in missing}
    (question,) = read_choices(write_csv(tmp_path / "test.csv", [row]), tmp_path).questions
    assert question.options == {"A": "necrosis", "B": "fibrosis", "C": "fat", "D": "none"}
    assert question.answer == "B"
    assert question.text.splitlines()[:3] == ["What is {seen}?", "A: necrosis", "B: fibrosis"]


def test_missing_choices_of_pandas_are_no_options(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text(
        "Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
        "a.jpg,Which?,fat,glands,nan,NaN,B\n"
    )
    (question,) = read_choices(path, NO_IMAGES).questions
    assert question.options == {"A": "fat", "B": "glands"}


def test_letters_leave_option_texts() -> None:
    assert strip_letter(" A: necrosis ", "A") == "necrosis"
    assert strip_letter("Actin", "A") == "Actin"


def test_pmcvqa_template_must_name_its_places(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", [ROW])
    with pytest.raises(ValueError, match=r"expected \{question\} and \{options\} in it"):
        read_choices(path, tmp_path, "{question}")


def test_a_question_can_be_worded_and_ordered_anew(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    path = write_csv(tmp_path / "test.csv", [ROW])
    (question,) = read_choices(path, tmp_path).questions
    assert (question.stem, question.cluster) == ("What is {seen}?", "a.png")
    options = {"A": "liver", "B": "fat"}
    other = question.variant(
        "swapped", options=options, answer="B", prompt=PROMPTS["pathmmu-llava"]
    )
    assert other.id == f"{question.id} [swapped]"
    assert other.text == (
        "What is {seen}?\n(A) liver\n(B) fat\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    with pytest.raises(ValueError, match="neither a known name nor a template"):
        read_choices(path, tmp_path, "leter")


FOUR = {"A": "necrosis", "B": "fibrosis", "C": "fat", "D": "none"}
TWO = {"A": "necrosis", "B": "fat"}
INSTRUCTION = "Answer with the letter of the correct option."


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("What is seen? A: necrosis B: fibrosis\nC: fat D: none", FOUR),
        (f"What is seen?\n(A) necrosis (B) fibrosis (C) fat (D) none\n\n{INSTRUCTION}", FOUR),
        (f"What is seen?\nA. necrosis\nB. fibrosis\nC. fat\nD. none\n{INSTRUCTION}", FOUR),
        ("A:\nnecrosis\nof fat\nB:\nfat\nor none", {"A": "necrosis\nof fat", "B": "fat\nor none"}),
        ("A patient who lacks vitamin D: what is seen? A: necrosis B: fat", TWO),
        ("Hepatitis A: what is seen? A: necrosis B: fat\nAnswer A. or B.", TWO),
        ("Which? A: vitamin D: too much B: fat", {"A": "vitamin D: too much", "B": "fat"}),
        ("Which of the four letters?", dict.fromkeys("ABCD", "")),
    ],
)
def test_questions_that_hold_their_options_are_read(
    tmp_path: Path, text: str, options: dict[str, str]
) -> None:
    save_image(tmp_path / "images" / "a.png")
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"1": {"question": text, "image": "a.png", "answer": "b"}}))
    (question,) = read_choices(path, None).questions
    assert question.text == text
    assert question.options == options
    assert question.answer == "B"


def test_class_folders_are_read(tmp_path: Path) -> None:
    for name in ("Photos/Normal/n1.tif", "Photos/Benign/b1.tif", "Photos/InSitu/i1.tif",
                 "Photos/Invasive/v1.tif", "Photos/Invasive/v2.tif"):  # fmt: skip
        save_image(tmp_path / name)
    found = read_class_folders(tmp_path, load_image_set("bach", "question"))
    assert [(q.id, q.answer) for q in found.questions][-1] == ("Photos/Invasive/v2.tif", "Invasive")
    assert len({question.text for question in found.questions}) == 1
    (tmp_path / "Photos/Benign/b1.tif").unlink()
    with pytest.raises(FileNotFoundError, match="'Benign'"):
        read_class_folders(tmp_path, load_image_set("bach", "question"))


def test_a_table_can_name_the_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "p1.png")
    save_image(tmp_path / "images" / "p2.png")
    write_csv(tmp_path / "colon_test.csv", [{"img_id": "p1.png", "tumor": "1"},
                                            {"img_id": "p2.png", "tumor": "0"}])  # fmt: skip
    found = read_class_folders(tmp_path, load_image_set("colonpath", "question"))
    assert [question.answer for question in found.questions] == ["tumor", "non-tumor"]


def test_a_config_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("name: mine\nquestion: Ask\nclasses: [{name: a}, {name: b, wordings: [x]}]\n")
    assert load_image_set(path, "question").wordings == {"a": ("a",), "b": ("x", "b")}
    path.write_text("name: mine\nquestion: Which?\nclasses: [{name: a}]\n")
    with pytest.raises(ValueError, match="expected at least two"):
        load_image_set(path, "question")
    path.write_text("name: mine\nclasses: [{name: a}, {name: b}]\n")
    with pytest.raises(ValueError, match="question"):
        load_image_set(path, "question")
    with pytest.raises(FileNotFoundError, match="bach, colonpath, oscc"):
        load_image_set("nothing", "question")


@pytest.mark.parametrize("name", image_set_names("question"))
def test_every_wording_of_a_shipped_config_means_its_class(name: str) -> None:
    class_set = load_image_set(name, "question")
    for item in class_set.classes:
        for wording in item.wordings:
            for answer in (wording, f"The image shows {wording.upper()}."):
                assert parse_class(answer, class_set.wordings) == item.name, answer


def test_the_originals_zero_shot_file_takes_labels_from_a_second_one(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    data, labels = tmp_path / "test.json", tmp_path / "labels.json"
    data.write_text(json.dumps({"s1": {"question": "Which?", "image": "a.png"}}))
    labels.write_text(json.dumps({"s1": 1}))
    class_set = load_image_set("oscc", "question")
    (question,) = read_class_records(data, None, class_set, labels).questions
    assert question.answer == "oral squamous cell carcinoma"
    (question,) = read_class_records(data, None, class_set).questions
    assert question.answer is None


@pytest.mark.parametrize("opcode", [pickle.LONG_BINPUT, pickle.PUT])
def test_a_pickle_that_asks_for_memory_it_cannot_fill_is_refused(
    tmp_path: Path, opcode: bytes
) -> None:
    """Nine bytes that make pickle allocate 16 GB for its memo."""
    index = (1 << 30).to_bytes(4, "little") if opcode == pickle.LONG_BINPUT else b"1073741824\n"
    path = tmp_path / "test.pkl"
    path.write_bytes(b"\x80\x02]" + opcode + index + b".")
    with pytest.raises(ValueError, match="at index 1073741824 of its memo"):
        read_plain_pickle(path)

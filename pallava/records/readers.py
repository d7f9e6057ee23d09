"""Reads PathVQA and PMC-VQA in their published formats, and conversations, as questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pallava.records.containers import (
    image_root,
    parquet_files,
    read_csv,
    read_parquet,
    read_records,
)
from pallava.records.questions import (
    ImageFolder,
    ParquetImage,
    Question,
    QuestionSet,
    RowError,
    as_mapping,
    collect,
    find_image,
    text_field,
)
from pallava.text.encoding import IMAGE_TOKEN, check_row
from pallava.text.words import words
from pathcore.files import StrPath

Rows = tuple[Iterator[tuple[str, Any]], Callable[[str, Any], Question]]
"""Pairs of id and record, and a function that builds a question from such a pair."""

CHOICE_PROMPT = "{question}\n{options}\nAnswer with the letter of the correct option."
"""Default prompt built from the columns of PMC-VQA's CSV (`--question-template`)."""

_LETTERS = "ABCDEFGH"
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
# "A: necrosis B: fibrosis", on one line or several.
_INLINE_OPTION = re.compile(r"(?:^|[\s(])([A-H])\s*[:.)]\s*(.*?)(?=(?:[\s(][A-H]\s*[:.)])|$)", re.S)


def read_vqa(
    data_path: StrPath, image_folder: ImageFolder | None, split: str = "test"
) -> QuestionSet:
    """Reads open and yes/no questions.

    Args:
        data_path: JSON object `id -> record`, list of records, JSON lines (flat records, or LLaVA
            conversations whose first question is used), PathVQA's pickle, or parquet files from the
            Hub; a folder stands for its files of `split`.
        image_folder: Image folder. Defaults to `images/` beside the data, or else the folder of the
            data. Not needed for parquet.
        split: Split to read from a folder of parquet files.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If the data has another format, or more than a tenth of its rows cannot be used.
    """
    return collect(data_path, *vqa_rows(data_path, image_folder, split))


def vqa_rows(data_path: StrPath, image_folder: ImageFolder | None, split: str = "test") -> Rows:
    """Returns the rows of `read_vqa` as an iterator, and the function that builds questions."""
    path = Path(data_path)
    if path.is_dir() or path.suffix == ".parquet":
        return read_parquet(parquet_files(path, split)), _parquet_question
    folder = image_folder or image_root(None, path, ("images",))

    def make(row_id: str, row: Any) -> Question:
        if isinstance(row, Mapping) and "conversations" in row:
            return _conversation_question(row_id, row, folder)
        record = as_mapping(row)
        name = record.get("image", record.get("img_id", record.get("image_name")))
        return _vqa_question(row_id, record, find_image(folder, name))

    return read_records(path), make


def read_choices(
    data_path: StrPath, image_folder: ImageFolder | None, question_template: str = CHOICE_PROMPT
) -> QuestionSet:
    """Reads multiple-choice questions.

    Args:
        data_path: PMC-VQA's CSV (`Figure_path`, `Question`, `Choice A` ..., and `Answer_label` or
            `Answer`), or records `id -> {question, image, answer}` whose question contains the
            options and whose answer is a letter.
        image_folder: Image folder; see `read_vqa`.
        question_template: Prompt for CSV rows, with `{question}` and `{options}`.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If the data has another format, or more than a tenth of its rows cannot be used.
    """
    return collect(data_path, *choice_rows(data_path, image_folder, question_template))


def choice_rows(
    data_path: StrPath, image_folder: ImageFolder | None, question_template: str = CHOICE_PROMPT
) -> Rows:
    """Returns the rows of `read_choices` as an iterator, and the function that builds questions."""
    path = Path(data_path)
    folder = image_folder or image_root(None, path, ("images",))
    if path.suffix != ".csv":
        return read_records(path), lambda row_id, row: _asked_choice(row_id, row, folder)
    if "{question}" not in question_template or "{options}" not in question_template:
        raise ValueError(
            f"question template {question_template!r}: {{question}} and {{options}} must be in it"
        )
    return read_csv(path), lambda row_id, row: _csv_choice(row_id, row, folder, question_template)


def answer_type_of(answer: str) -> str:
    """Classifies an answer as `yes/no`, `number` or `other`, as PathVQA's own files do."""
    text = " ".join(words(answer))
    if text in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(text) else "other"


def question_type_of(question: str) -> str:
    """Returns the opening words of a question: `what`, `is`, `how many`, ..."""
    first = words(question)[:2]
    if first[:1] == ["how"]:
        return " ".join(first)
    return first[0] if first else ""


def strip_letter(text: str, letter: str) -> str:
    """Strips an option's own letter from its text: published files contain ` A: necrosis `."""
    match = re.match(rf"\s*{re.escape(letter)}\s*[:.)]\s*", text, flags=re.IGNORECASE)
    return (text[match.end() :] if match else text).strip()


def _vqa_question(row_id: str, record: Mapping[str, Any], image: Any) -> Question:
    text = text_field(record, "question", "sent").replace(IMAGE_TOKEN, "").strip()
    answer = _answer(record)
    return Question(
        id=row_id,
        text=text,
        image=image,
        answer=answer,
        answer_type=str(record.get("answer_type") or answer_type_of(answer)),
        question_type=str(record.get("question_type") or question_type_of(text)),
    )


def _answer(record: Mapping[str, Any]) -> str:
    label = record.get("label")
    if "answer" not in record and isinstance(label, Mapping) and label:
        # Scored answers, the training format of VQA classifiers; the best one is the reference.
        return str(max(label, key=lambda answer: float(label[answer])))
    return text_field(record, "answer")


def _parquet_question(row_id: str, record: dict[str, Any]) -> Question:
    path, group, row = record.pop("_parquet")
    return _vqa_question(row_id, record, ParquetImage(path, group, row))


def _conversation_question(row_id: str, row: Mapping[str, Any], folder: ImageFolder) -> Question:
    if fault := check_row(row):
        raise RowError(fault)
    turns = list(row["conversations"])
    while turns[0]["from"] == "gpt":
        turns = turns[1:]
    answer = next(turn["value"] for turn in turns if turn["from"] == "gpt")
    record = {"question": turns[0]["value"], "answer": answer}
    image = find_image(folder, row["image"]) if row.get("image") else None
    return _vqa_question(row_id, record, image)


def _asked_choice(row_id: str, row: Any, folder: ImageFolder) -> Question:
    record = as_mapping(row)
    text = text_field(record, "question")
    options = {m.group(1): m.group(2).strip() for m in _INLINE_OPTION.finditer(text)}
    if len(options) < 2:
        options = dict.fromkeys("ABCD", "")
    return Question(
        id=row_id,
        text=text,
        image=find_image(folder, record.get("image")),
        answer=_letter(text_field(record, "answer"), options),
        answer_type="choice",
        question_type=question_type_of(text),
        options=options,
    )


def _csv_choice(row_id: str, row: Any, folder: ImageFolder, template: str) -> Question:
    record = {str(name).strip(): value for name, value in as_mapping(row).items()}
    options = {
        letter: strip_letter(record[f"Choice {letter}"], letter)
        for letter in _LETTERS
        if record.get(f"Choice {letter}", "").strip()
    }
    if len(options) < 2:
        raise RowError(f"expected at least two of the columns 'Choice A' ..., found {len(options)}")
    text = text_field(record, "Question")
    listed = "\n".join(f"{letter}: {option}" for letter, option in options.items())
    return Question(
        id=row_id,
        # str.format would fail on questions that contain braces.
        text=template.replace("{options}", listed).replace("{question}", text),
        image=find_image(folder, record.get("Figure_path")),
        answer=_letter(text_field(record, "Answer_label", "Answer"), options),
        answer_type="choice",
        question_type=question_type_of(text),
        options=options,
    )


def _letter(answer: str, options: Mapping[str, str]) -> str:
    if answer.strip().upper() in options:
        return answer.strip().upper()
    equal = [letter for letter, text in options.items() if text and words(text) == words(answer)]
    if len(equal) != 1:
        raise RowError(
            f"answer {answer!r:.60} is neither a letter of {', '.join(options)} nor an option"
        )
    return equal[0]

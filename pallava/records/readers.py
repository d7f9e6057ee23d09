"""Reads PathVQA and PMC-VQA in their published formats, and conversations, as questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallava.records.containers import (
    image_root,
    parquet_files,
    read_csv,
    read_parquet,
    read_records,
)
from pallava.records.prompts import DEFAULT_PROMPT, Prompt, find_prompt
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

LETTERS = "ABCDEFGH"
LABEL = re.compile(r"\s*\(?([A-Ha-h])\s*[).:]\s*")
"""Letter before an option or an answer: `B) oedema`."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
# "A: necrosis B: fibrosis", on one line or several.
_INLINE_LABEL = re.compile(r"(?:^|[\s(])([A-H])\s*[:.)]")


def read_vqa(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    split: str = "test",
    prompt: str = DEFAULT_PROMPT,
) -> QuestionSet:
    """Reads open and yes/no questions.

    Args:
        data_path: JSON object `id -> record`, list of records, JSON lines (flat records, or LLaVA
            conversations whose first question is used), PathVQA's pickle, or parquet files from the
            Hub; a folder stands for its files of `split`.
        image_folder: Image folder. Defaults to `images/` beside the data, or else the folder of the
            data. Not needed for parquet.
        split: Split to read from a folder of parquet files.
        prompt: Prompt of the questions; see `pallava.records.prompts`.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If the data has another format, or more than a tenth of its rows cannot be used.
    """
    return collect(data_path, *vqa_rows(data_path, image_folder, split, prompt))


def vqa_rows(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    split: str = "test",
    prompt: str = DEFAULT_PROMPT,
) -> Rows:
    """Returns the rows of `read_vqa` as an iterator, and the function that builds questions."""
    path, wording = Path(data_path), find_prompt(prompt)
    if path.is_dir() or path.suffix == ".parquet":
        files = parquet_files(path, split)
        return read_parquet(files), lambda row_id, row: _parquet_question(row_id, row, wording)
    folder = image_folder or image_root(None, path, ("images",))

    def make(row_id: str, row: Any) -> Question:
        if isinstance(row, Mapping) and "conversations" in row:
            return _conversation_question(row_id, row, folder, wording)
        record = as_mapping(row)
        name = record.get("image", record.get("img_id", record.get("image_name")))
        return _vqa_question(row_id, record, find_image(folder, name), wording, str(name))

    return read_records(path), make


def read_choices(
    data_path: StrPath, image_folder: ImageFolder | None, prompt: str = DEFAULT_PROMPT
) -> QuestionSet:
    """Reads multiple-choice questions.

    Args:
        data_path: PMC-VQA's CSV (`Figure_path`, `Question`, `Choice A` ..., and `Answer_label` or
            `Answer`), or records `id -> {question, image, answer}` whose question contains the
            options and whose answer is a letter.
        image_folder: Image folder; see `read_vqa`.
        prompt: Prompt of CSV rows; see `pallava.records.prompts`.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If the data has another format, or more than a tenth of its rows cannot be used.
    """
    return collect(data_path, *choice_rows(data_path, image_folder, prompt))


def choice_rows(
    data_path: StrPath, image_folder: ImageFolder | None, prompt: str = DEFAULT_PROMPT
) -> Rows:
    """Returns the rows of `read_choices` as an iterator, and the function that builds questions."""
    path = Path(data_path)
    folder = image_folder or image_root(None, path, ("images",))
    if path.suffix != ".csv":
        return read_records(path), lambda row_id, row: _asked_choice(row_id, row, folder)
    wording = find_prompt(prompt)
    return read_csv(path), lambda row_id, row: _csv_choice(row_id, row, folder, wording)


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


def _vqa_question(
    row_id: str, record: Mapping[str, Any], image: Any, prompt: Prompt, cluster: str
) -> Question:
    stem = text_field(record, "question", "sent").replace(IMAGE_TOKEN, "").strip()
    answer = _answer(record)
    answer_type = _answer_type(record, answer)
    return Question(
        id=row_id,
        text=prompt.render(stem, {}, answer_type),
        image=image,
        answer=answer,
        answer_type=answer_type,
        question_type=str(record.get("question_type") or question_type_of(stem)),
        stem=stem,
        prompt=prompt,
        cluster=cluster,
    )


def _answer_type(record: Mapping[str, Any], answer: str) -> str:
    stated = str(record.get("answer_type") or "").strip().lower()
    if stated in ("number", "other"):
        return stated
    # VQA-RAD states CLOSED or OPEN. Some sets also call a choice between two words closed.
    is_closed = stated in ("yes/no", "closed")
    if is_closed and words(answer)[:1] in (["yes"], ["no"]):
        return "yes/no"
    return answer_type_of(answer)


def _answer(record: Mapping[str, Any]) -> str:
    label = record.get("label")
    if "answer" not in record and isinstance(label, Mapping) and label:
        # Scored answers, the training format of VQA classifiers; the best one is the reference.
        try:
            return str(max(label, key=lambda answer: float(label[answer])))
        except (TypeError, ValueError) as error:
            raise RowError(f"label: expected a score by answer, found {label!r:.80}") from error
    return text_field(record, "answer")


def _parquet_question(row_id: str, record: dict[str, Any], prompt: Prompt) -> Question:
    path, group, row = record.pop("_parquet")
    return _vqa_question(row_id, record, ParquetImage(path, group, row), prompt, "")


def _conversation_question(
    row_id: str, row: Mapping[str, Any], folder: ImageFolder, prompt: Prompt
) -> Question:
    if fault := check_row(row):
        raise RowError(fault)
    turns = list(row["conversations"])
    while turns[0]["from"] == "gpt":
        turns = turns[1:]
    answer = next(turn["value"] for turn in turns if turn["from"] == "gpt")
    record = {"question": turns[0]["value"], "answer": answer}
    image = find_image(folder, row["image"]) if row.get("image") else None
    return _vqa_question(row_id, record, image, prompt, str(row.get("image") or ""))


def _asked_choice(row_id: str, row: Any, folder: ImageFolder) -> Question:
    record = as_mapping(row)
    text = text_field(record, "question")
    options = _inline_options(text)
    return Question(
        id=row_id,
        text=text,
        image=find_image(folder, record.get("image")),
        answer=answer_letter(text_field(record, "answer"), options),
        answer_type="choice",
        question_type=question_type_of(text),
        options=options,
        cluster=str(record.get("image")),
    )


def _inline_options(text: str) -> dict[str, str]:
    """Returns the options in a text, labelled A, B, C, ...; without them four empty ones."""
    labels = list(_INLINE_LABEL.finditer(text))
    runs = [_run(labels[number:]) for number, label in enumerate(labels) if label[1] == "A"]
    # Of equally long runs the first, from the nearest A: "Hepatitis A: which? A: x B: y".
    best = max(runs, key=lambda run: (len(run), -run[-1].start(), run[0].start()), default=[])
    if len(best) < 2:
        return dict.fromkeys("ABCD", "")
    ends = [*(label.start() for label in best[1:]), len(text)]
    texts = [text[label.end() : end].strip() for label, end in zip(best, ends, strict=True)]
    # What follows the last option is an instruction, unless other options have several lines too.
    if not any("\n" in option for option in texts[:-1]):
        texts[-1] = texts[-1].partition("\n")[0].rstrip()
    return {label[1]: option for label, option in zip(best, texts, strict=True)}


def _run(labels: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    run: list[re.Match[str]] = []
    for label in labels:
        if label[1] == LETTERS[len(run) : len(run) + 1]:
            run.append(label)
    return run


def _csv_choice(row_id: str, row: Any, folder: ImageFolder, prompt: Prompt) -> Question:
    record = {str(name).strip(): value for name, value in as_mapping(row).items()}
    options = {
        letter: strip_letter(record[f"Choice {letter}"], letter)
        for letter in LETTERS
        if record.get(f"Choice {letter}", "").strip().lower() not in ("", "nan")
    }
    if len(options) < 2:
        raise RowError(f"expected at least two of the columns 'Choice A' ..., found {len(options)}")
    stem = text_field(record, "Question")
    return Question(
        id=row_id,
        text=prompt.render(stem, options, "choice"),
        image=find_image(folder, record.get("Figure_path")),
        # Early copies of the CSV spell the column "Anwser".
        answer=answer_letter(text_field(record, "Answer_label", "Answer", "Anwser"), options),
        answer_type="choice",
        question_type=question_type_of(stem),
        options=options,
        stem=stem,
        prompt=prompt,
        cluster=str(record.get("Figure_path")),
    )


def answer_letter(answer: str, options: Mapping[str, str]) -> str:
    """Returns the letter of an answer: a letter, the text of one option, or both (`B) oedema`).

    Raises:
        RowError: If it is none of these.
    """
    label = LABEL.match(answer)
    letter = (label.group(1) if label else answer.strip()).upper()
    text = answer[label.end() :] if label else ""
    if letter in options and (not text or words(text) == words(options[letter])):
        return letter
    equal = [key for key, option in options.items() if option and words(option) == words(answer)]
    if len(equal) != 1:
        raise RowError(
            f"answer {answer!r:.60} is neither a letter of {', '.join(options)} nor an option"
        )
    return equal[0]

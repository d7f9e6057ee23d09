"""Reads Quilt-VQA and Quilt-VQA-RED (arXiv:2312.04746): questions of narrators of teaching videos.

Published as parquet (`image`, `question`, `answer`, `answer_type`), and as JSON: answers in
`quiltvqa_test_w_ans.json` and questions as they were put to models in `quiltvqa_test_wo_ans.jsonl`.
The red part has a circle drawn into the pixels and a second file of questions,
`quiltvqa_nored_test_wo_ans.jsonl`, that names the same images without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallava.records.containers import (
    data_file,
    image_root,
    parquet_files,
    read_parquet,
    read_records,
)
from pallava.records.prompts import DEFAULT_PROMPT, PUBLISHED_PROMPT, Prompt, find_prompt
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
from pallava.records.readers import question_type_of
from pallava.text.encoding import IMAGE_TOKEN
from pallava.text.words import words
from pathcore.files import StrPath

ANSWERS = "quiltvqa_test_w_ans.json"
RED_ANSWERS = "quiltvqa_red_test_w_ans.json"
QUESTIONS = "quiltvqa_test_wo_ans.jsonl"
RED_QUESTIONS = "quiltvqa_red_test_wo_ans.jsonl"
PLAIN_QUESTIONS = "quiltvqa_nored_test_wo_ans.jsonl"
_IMAGES = ("images", "quilt_vqa/images", "quilt_vqa", "red_circle/images", "red_circle")


def read_quilt_vqa(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    prompt: str = DEFAULT_PROMPT,
    *,
    red: bool = False,
    circle: bool = True,
) -> QuestionSet:
    """Reads open and closed questions.

    Args:
        data_path: Folder of the published files, the file of answers (JSON or JSON lines), or a
            parquet file or a folder of them. The published split is called `train`.
        image_folder: Image folder; by default searched beside the data. Not needed for parquet.
        prompt: Prompt of the questions; see `pallava.records.prompts`. `published` takes the text
            of the published file of questions.
        red: Whether to read the red part.
        circle: Whether to show the images of the red part with their circles.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the data has another format, holds no images without circles, or more than a
            tenth of its rows cannot be used.
    """
    path = Path(data_path)
    names = (RED_ANSWERS if red else ANSWERS,)
    if path.suffix == ".parquet" or (path.is_dir() and not (path / names[0]).is_file()):
        if not circle or prompt == PUBLISHED_PROMPT:
            raise ValueError(
                f"{path}: images without circles and the published prompt are only in the JSON "
                f"release; expected {names[0]} and {PLAIN_QUESTIONS}"
            )
        wording = find_prompt(prompt)

        def make_stored(row_id: str, row: Any) -> Question:
            image = ParquetImage(*row.pop("_parquet"))
            return _question(row_id, row, image, image.name, wording)

        try:
            files = parquet_files(path, "train")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, and no {names[0]}") from error
        return collect(path, read_parquet(files), make_stored)
    data = data_file(path, names)
    folder = image_folder or image_root(None, data, _IMAGES)
    asked_name = (RED_QUESTIONS if circle else PLAIN_QUESTIONS) if red else QUESTIONS
    asked: dict[str, Any] = {}
    if not circle or prompt == PUBLISHED_PROMPT or (data.parent / asked_name).is_file():
        asked = dict(read_records(data_file(data.parent, (asked_name,))))
    own_wording = None if prompt == PUBLISHED_PROMPT else find_prompt(prompt)

    def make(row_id: str, row: Any) -> Question:
        record = as_mapping(row)
        published = as_mapping(asked.get(row_id, {}))
        if not published and (own_wording is None or not circle):
            raise RowError(f"question {row_id} is not in {asked_name}")
        name = published.get("image") if not circle else record.get("image", published.get("image"))
        cluster = str(record.get("image", name))  # the same with and without circles
        image = find_image(folder, name)
        text = "" if own_wording else text_field(published, "text", "question")
        return _question(row_id, record, image, cluster, own_wording, text)

    return collect(data, read_records(data), make)


def _question(
    row_id: str,
    row: Mapping[str, Any],
    image: Any,
    cluster: str,
    prompt: Prompt | None,
    text: str = "",
) -> Question:
    stem = text_field(row, "question").replace(IMAGE_TOKEN, "").strip()
    kind = text_field(row, "answer_type")
    is_closed = kind.upper() == "CLOSED"
    answer_type = "yes/no" if is_closed else "other"
    answer = _yes_or_no(row) if is_closed else text_field(row, "answer")
    text = prompt.render(stem, {}, answer_type) if prompt else text.replace(IMAGE_TOKEN, "").strip()
    return Question(
        id=row_id,
        text=text,
        image=image,
        answer=answer,
        answer_type=answer_type,
        question_type=question_type_of(stem),
        stem=stem,
        prompt=prompt,
        cluster=cluster,
    )


def _yes_or_no(row: Mapping[str, Any]) -> str:
    """Returns the reference of a closed question: its field, or the first word of the answer."""
    for name in ("yes_no_answer", "answer"):
        said = words(str(row.get(name) or ""))[:1]
        if said in (["yes"], ["no"]):
            return said[0]
    raise RowError(
        f"yes_no_answer: expected yes or no for a closed question, found "
        f"{row.get('yes_no_answer', row.get('answer'))!r:.60}"
    )

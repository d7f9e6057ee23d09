"""Reads SlideBench (SlideChat, arXiv:2410.11761): multiple choice about whole slides.

`SlideBench-VQA-TCGA.csv` has the columns `ID, Slide, Tumor, Broad Category, Narrow Category,
Question, A, B, C, D, Answer`, and `SlideBench-VQA-BCNB.csv` `Slide, Task, Question, A, B, C, D,
Answer`. Options may be empty. A slide is a file of tile features or, for models that read images,
an overview picture.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pallava.records.containers import data_file, image_root, read_csv
from pallava.records.prompts import DEFAULT_PROMPT, Prompt, find_prompt
from pallava.records.questions import (
    ImageFolder,
    ImageSource,
    NoImages,
    Question,
    QuestionSet,
    RowError,
    SlideFeatures,
    as_mapping,
    collect,
    find_image,
    text_field,
)
from pallava.records.readers import answer_letter, question_type_of, strip_letter
from pathcore.files import StrPath
from pathcore.images import ImageError, path_inside

FILES = {"tcga": "SlideBench-VQA-TCGA.csv", "bcnb": "SlideBench-VQA-BCNB.csv"}
_GROUPS = {
    "Tumor": "tumor",
    "Broad Category": "category",
    "Narrow Category": "subcategory",
    "Task": "task",
}
_LETTERS = "ABCD"


def read_slidebench(
    data_path: StrPath,
    slide_folder: ImageFolder | None,
    part: str,
    prompt: str = DEFAULT_PROMPT,
) -> QuestionSet:
    """Reads the questions of one part.

    Args:
        data_path: CSV file, or its folder. Results of other programs are accepted too; their
            `Output` column is ignored.
        slide_folder: Folder with `SLIDE.h5` (`features`, `coords`) or with overview pictures named
            `SLIDE.png`, `.jpg`, ..., directly or in a folder per tumor. Defaults to `slides/`
            beside the data.
        part: `tcga` or `bcnb`.
        prompt: Prompt of the questions; see `pallava.records.prompts`.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If the data has another format, or no question can be used.
    """
    path = data_file(data_path, (FILES[part],))
    folder = slide_folder or image_root(None, path, ("slides",))
    wording = find_prompt(prompt)
    rows = ((f"{part}-{row_id}", row) for row_id, row in read_csv(path))
    # Features of all slides are seldom at hand: only one of the tumors is shared by the authors.
    return collect(
        path, rows, lambda row_id, row: _question(row_id, row, folder, wording), sparse=True
    )


def _question(row_id: str, row: Any, folder: ImageFolder, prompt: Prompt) -> Question:
    record = {str(name).strip().lstrip("\ufeff"): value for name, value in as_mapping(row).items()}
    options = {
        letter: strip_letter(record[letter], letter)
        for letter in _LETTERS
        if str(record.get(letter) or "").strip().lower() not in ("", "nan")
    }
    if len(options) < 2:
        raise RowError(f"expected at least two options in the columns A to D, found {len(options)}")
    slide = text_field(record, "Slide").removesuffix(".0")  # numbers that went through pandas
    stem = text_field(record, "Question")
    groups = {
        group: str(record[name]).strip()
        for name, group in _GROUPS.items()
        if str(record.get(name) or "").strip()
    }
    return Question(
        id=row_id,
        text=prompt.render(stem, options, "choice"),
        image=_find_slide(folder, slide, groups.get("tumor", "")),
        answer=answer_letter(text_field(record, "Answer"), options),
        answer_type="choice",
        question_type=question_type_of(stem),
        options=options,
        stem=stem,
        prompt=prompt,
        cluster=_patient(slide),
        groups=groups,
    )


def _find_slide(folder: ImageFolder, slide: str, tumor: str) -> ImageSource | None:
    if isinstance(folder, NoImages):
        return None
    name = str(PurePosixPath(slide).with_suffix("")) if slide.endswith((".csv", ".svs")) else slide
    places = (f"{tumor}/{name}", name) if tumor else (name,)
    for place in places:
        path = path_inside(Path(folder), f"{place}.h5")
        if path.is_file():
            return SlideFeatures(path, name)
    for place in places:
        with suppress(ImageError):
            return find_image(folder, place)
    raise ImageError(f"slide {name}: neither {places[0]}.h5 nor a picture of it in {folder}")


def _patient(slide: str) -> str:
    """Returns the patient of a TCGA slide, whose slides are not independent, or else the slide."""
    return "-".join(slide.split("-")[:3]) if slide.startswith("TCGA-") else slide

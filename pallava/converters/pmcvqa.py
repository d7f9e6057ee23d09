"""PMC-VQA (arXiv:2305.10415): multiple choice about figures of PubMed Central.

Published as `train.csv`, `test.csv` (`Figure_path, Question, Answer, Choice A..D, Answer_label`)
with `images.zip`, and `train_2.csv`, `test_2.csv` (`index, Figure_path, Caption, Question,
Choice A..D, Answer, split`) with `images_2.zip`, which unpacks to `figures/`.
"""

from __future__ import annotations

from typing import Any, Literal

from pallava.converters.conversion import Conversion, Row, question_row
from pallava.converters.pmc_oa import article
from pallava.records.containers import data_file, image_root
from pallava.records.prompts import DEFAULT_PROMPT
from pallava.records.questions import Question, as_mapping
from pallava.records.readers import choice_rows
from pallava.registry import CONVERTERS
from pathcore.files import StrPath

IMAGE_FOLDERS = ("images", "figures")


@CONVERTERS.register("pmc-vqa")
def pmc_vqa(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    split: str = "train",
    answer: Literal["letter", "text", "both"] = "letter",
    prompt: str = DEFAULT_PROMPT,
) -> Conversion:
    """Converts PMC-VQA to conversations; captions in the data are kept in `caption` for cleaning.

    Args:
        data_path: CSV file, or a folder with `{split}.csv` or `{split}_2.csv`.
        image_folder: Image folder. Defaults to `images/` or `figures/` beside the CSV.
        split: Split to read from a folder.
        answer: Form of the answer: the letter, the option's text, or `both` as `A: text`.
        prompt: Name of a prompt, or a template with `{question}` and `{options}`.
    """
    if answer not in ("letter", "text", "both"):
        raise ValueError(f"pmc-vqa: expected answer=letter|text|both, found {answer}")
    data = data_file(data_path, (f"{split}.csv", f"{split}_2.csv"))
    folder = image_root(image_folder, data, IMAGE_FOLDERS)
    records, make_question = choice_rows(data, folder, prompt)

    def make(where: str, record: Any) -> list[Row]:
        question = make_question(where, record)
        row = question_row(question, folder, _answer(question, answer))
        about = article(str(row["image"]))
        if caption := str(as_mapping(record).get("Caption") or "").strip():
            about["caption"] = caption
        return [{"id": f"pmc-vqa-{data.stem}-{where}", **row, **about}]

    return Conversion(
        "conversations",
        "PMC-VQA",
        "CC-BY-SA; images: per article",
        records,
        make,
        folder,
        [data],
        {"answer": answer, "prompt": prompt},
    )


def _answer(question: Question, form: str) -> str:
    letter = str(question.answer)
    text = question.options.get(letter, "")
    return {"letter": letter, "text": text, "both": f"{letter}: {text}"}[form]

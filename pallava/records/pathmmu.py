"""Reads PathMMU (arXiv:2401.16355): multiple choice about images from five sources.

Published as `data.json`, `subset -> split -> rows`, beside `images/`. `PathCLS` has one more level,
`PathCLS -> source data set -> split -> rows`. Only the images of two subsets come with the
questions; the others have to be collected from their sources, and some are no longer available.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pallava.records.containers import data_file, image_root
from pallava.records.prompts import DEFAULT_PROMPT, Prompt, find_prompt
from pallava.records.questions import (
    ImageFolder,
    Question,
    QuestionSet,
    RowError,
    as_mapping,
    collect,
    find_image,
    text_field,
)
from pallava.records.readers import LABEL, LETTERS, answer_letter, question_type_of
from pathcore.files import StrPath

SUBSETS = ("PubMed", "SocialPath", "EduContent", "Atlas", "PathCLS")
SPLITS = {
    "val": ("val",),
    "test": ("test",),
    "test_tiny": ("test_tiny",),
    # The published "test" rows of the leaderboard pool both, which share no question.
    "all": ("test", "test_tiny"),
    "train": ("train",),
}


def read_pathmmu(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    split: str = "test_tiny",
    subsets: str = "",
    prompt: str = DEFAULT_PROMPT,
) -> QuestionSet:
    """Reads one split of some or all subsets.

    Questions whose image is absent are skipped and counted in `QuestionSet.totals`, however many
    there are.

    Args:
        data_path: `data.json`, or its folder.
        image_folder: Image folder. Defaults to `images/` beside the data.
        split: `val`, `test`, `test_tiny`, `train`, or `all` for `test` and `test_tiny`.
        subsets: Comma-separated subsets; all by default.
        prompt: Prompt of the questions; see `pallava.records.prompts`.

    Raises:
        FileNotFoundError: If the data does not exist.
        ValueError: If split or subset is unknown, the file has another format, or no question can
            be used.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    wanted = [name.strip() for name in subsets.split(",") if name.strip()] or list(SUBSETS)
    known = {name.lower(): name for name in SUBSETS}
    if unknown := [name for name in wanted if name.lower() not in known]:
        raise ValueError(f"subset {unknown[0]!r}: expected one of {', '.join(SUBSETS)}")
    path = data_file(data_path, ("data.json",))
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, Mapping) or not known.values() & content.keys():
        raise ValueError(f"{path}: expected an object with the subsets {', '.join(SUBSETS)}")
    folder = image_folder or image_root(None, path, ("images",))
    wording = find_prompt(prompt)

    def make(row_id: str, row: Any) -> Question:
        return _question(row_id, as_mapping(row), folder, wording)

    rows = _rows(content, {known[name.lower()] for name in wanted}, SPLITS[split])
    return collect(path, rows, make, sparse=True, subset_of=lambda row_id: row_id.split("/")[0])


def _rows(
    content: Mapping[str, Any], subsets: set[str], splits: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    for subset in (name for name in content if name in subsets):
        parts = content[subset]
        if not isinstance(parts, Mapping):
            raise ValueError(f"{subset}: expected an object of splits, found {parts!r:.60}")
        # PathCLS: source -> split; the others: split.
        nested = all(isinstance(part, Mapping) for part in parts.values())
        sources = parts.items() if nested and parts else [("", parts)]
        for source, by_split in sources:
            for split in splits:
                seen: set[str] = set()
                rows = by_split.get(split, [])
                if not isinstance(rows, list):
                    raise ValueError(
                        f"{subset}/{split}: expected a list of rows, found {rows!r:.60}"
                    )
                for number, row in enumerate(rows):
                    stated = row.get("No") if isinstance(row, Mapping) else None
                    # Slashes part the levels of the id.
                    where = str(number if stated in (None, "") else stated).replace("/", "_")
                    if where in seen:  # numbers are repeated in places
                        where = f"{where}-{number}"
                    seen.add(where)
                    yield "/".join(filter(None, (subset, source, split, where))), row


def _question(row_id: str, row: Mapping[str, Any], folder: ImageFolder, prompt: Prompt) -> Question:
    stem = text_field(row, "question")
    options = _options(row.get("options"))
    name = text_field(row, "img")
    subset, *source, split, _ = row_id.split("/")
    groups = {"subset": subset, "split": split}
    return Question(
        id=row_id,
        text=prompt.render(stem, options, "choice"),
        image=find_image(folder, name),
        answer=answer_letter(text_field(row, "answer"), options),
        answer_type="choice",
        question_type=question_type_of(stem),
        options=options,
        stem=stem,
        prompt=prompt,
        cluster=name,
        groups=groups | ({"source": source[0]} if source else {}),
    )


def _options(value: Any) -> dict[str, str]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise RowError(
            f"options: expected a list of 2 to {len(LETTERS)} texts, found {value!r:.80}"
        )
    options = {}
    for letter, item in zip(LETTERS, value, strict=False):
        text = text_field({f"option {letter}": item}, f"option {letter}")
        label = LABEL.match(text)
        if label and label.group(1).upper() != letter:
            raise RowError(f"options: option {letter} is labelled {text!r:.40}")
        options[letter] = (text[label.end() :] if label else text).strip()
    return options

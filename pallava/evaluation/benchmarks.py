"""Benchmarks available by name; other packages can register more.

An entry of `pallava.registry.EVALUATIONS` is a function of a data path, an image folder and its own
options that returns a `Benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pallava.evaluation import scoring
from pallava.records.class_folders import (
    read_class_folders,
    read_class_records,
)
from pallava.records.prompts import DEFAULT_PROMPT
from pallava.records.questions import ImageFolder, Question, QuestionSet
from pallava.records.readers import read_choices, read_vqa
from pallava.records.resizing import ResizedImage, check_rule
from pallava.registry import EVALUATIONS
from pathcore.files import StrPath
from pathcore.image_sets import load_image_set

Scorer = Callable[[Sequence[Question], Mapping[str, str], Any], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """Questions, and how their answers are scored.

    Attributes:
        name: Name in reports.
        questions: Questions, and rows that cannot be used.
        score: Function of questions, answers by id, and tokenizer or None that returns `scores`,
            `details` and further tables. None if the data has no references.
        result_name: File name of the answers in the work folder.
    """

    name: str
    questions: QuestionSet
    score: Scorer | None
    result_name: str


def resized(benchmark: Benchmark, rule: str) -> Benchmark:
    """Returns a benchmark whose images are resized first; see `pallava.records.resizing.resize`.

    Raises:
        ValueError: If the rule is unknown.
    """
    check_rule(rule)
    questions = [
        question
        if question.image is None
        else replace(question, image=ResizedImage(question.image, rule))
        for question in benchmark.questions.questions
    ]
    return replace(benchmark, questions=QuestionSet(questions, benchmark.questions.skipped))


@EVALUATIONS.register("pathvqa")
def pathvqa(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    split: str = "test",
    prompt: str = DEFAULT_PROMPT,
) -> Benchmark:
    """PathVQA (arXiv:2003.10286), and other open and yes/no questions."""
    questions = read_vqa(data_path, image_folder, split, prompt)
    return Benchmark("pathvqa", questions, scoring.score_vqa, "pathvqa_result.json")


@EVALUATIONS.register("pmcvqa")
def pmcvqa(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    prompt: str = DEFAULT_PROMPT,
) -> Benchmark:
    """PMC-VQA (arXiv:2305.10415), and other multiple choice."""
    questions = read_choices(data_path, image_folder, prompt)
    return Benchmark("pmcvqa", questions, scoring.score_choices, "pmcvqa_result.json")


@EVALUATIONS.register("zero-shot")
def zero_shot(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    classes: StrPath | None = None,
    labels: StrPath | None = None,
) -> Benchmark:
    """Classification by asking: folders of images by class, or the original's list of questions.

    Args:
        data_path: Folder of images, or a file `id -> {question, image}`.
        image_folder: Image folder of a data file.
        classes: Config of the classes: a file, or the name of a shipped config.
        labels: JSON file `id -> class name or number`, for a data file.

    Raises:
        ValueError: If `data_path` is a folder and `classes` is missing.
    """
    class_set = load_image_set(classes, "question") if classes is not None else None
    if Path(data_path).is_dir():
        if class_set is None:
            raise ValueError(
                f"{data_path} is a folder: name the config of its classes with --classes"
            )
        questions = read_class_folders(data_path, class_set)
    else:
        questions = read_class_records(data_path, image_folder, class_set, labels)
    known = class_set is not None and any(q.answer is not None for q in questions.questions)
    score: Scorer | None = None
    if known and class_set is not None:
        score = partial(scoring.score_classes, class_set=class_set)
    name = f"zero-shot {class_set.name}" if class_set else "zero-shot"
    return Benchmark(name, questions, score, "zeroshot_result.json")

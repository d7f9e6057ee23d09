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
from pallava.records.pathmmu import read_pathmmu
from pallava.records.prompts import DEFAULT_PROMPT
from pallava.records.questions import ImageFolder, Question, QuestionSet
from pallava.records.quilt_vqa import read_quilt_vqa
from pallava.records.readers import read_choices, read_vqa
from pallava.records.resizing import ResizedImage, check_rule
from pallava.records.slidebench import read_slidebench
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
    return replace(benchmark, questions=replace(benchmark.questions, questions=questions))


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


@EVALUATIONS.register("pmc-vqa")
def pmc_vqa(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    prompt: str = DEFAULT_PROMPT,
) -> Benchmark:
    """PMC-VQA (arXiv:2305.10415), and other multiple choice."""
    questions = read_choices(data_path, image_folder, prompt)
    score = partial(scoring.score_choices, rules=("pa-llava", "pmc-vqa"))
    return Benchmark("pmc-vqa", questions, score, "pmcvqa_result.json")


@EVALUATIONS.register("pathmmu")
def pathmmu(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    split: str = "test_tiny",
    subsets: str = "",
    prompt: str = DEFAULT_PROMPT,
) -> Benchmark:
    """PathMMU (arXiv:2401.16355): multiple choice from five sources."""
    questions = read_pathmmu(data_path, image_folder, split, subsets, prompt)
    score = partial(scoring.score_choices, rules=("pathmmu",))
    return Benchmark(f"pathmmu {split}", questions, score, "pathmmu_result.json")


@EVALUATIONS.register("quilt-vqa")
def quilt_vqa(
    data_path: StrPath, image_folder: ImageFolder | None = None, *, prompt: str = DEFAULT_PROMPT
) -> Benchmark:
    """Quilt-VQA (arXiv:2312.04746): open and yes/no questions of narrators of videos."""
    return _quilt("quilt-vqa", read_quilt_vqa(data_path, image_folder, prompt))


@EVALUATIONS.register("quilt-vqa-red")
def quilt_vqa_red(
    data_path: StrPath,
    image_folder: ImageFolder | None = None,
    *,
    circle: str = "yes",
    prompt: str = DEFAULT_PROMPT,
) -> Benchmark:
    """The part of Quilt-VQA whose questions are about a circled region.

    Args:
        data_path: See `pallava.records.quilt_vqa`.
        image_folder: Image folder.
        circle: `yes`, or `no` for the same questions about the images without circles.
        prompt: Prompt of the questions.

    Raises:
        ValueError: If `circle` is neither `yes` nor `no`, or the data cannot be used.
    """
    if circle not in ("yes", "no"):
        raise ValueError(f"circle {circle!r}: expected yes or no")
    shown = circle == "yes"
    questions = read_quilt_vqa(data_path, image_folder, prompt, red=True, circle=shown)
    return _quilt("quilt-vqa-red" if shown else "quilt-vqa-red without circles", questions)


def _quilt(name: str, questions: QuestionSet) -> Benchmark:
    score = partial(scoring.score_vqa, rules=("quilt-vqa",))
    return Benchmark(name, questions, score, "quiltvqa_result.json")


@EVALUATIONS.register("slidebench-tcga")
def slidebench_tcga(
    data_path: StrPath, image_folder: ImageFolder | None = None, *, prompt: str = DEFAULT_PROMPT
) -> Benchmark:
    """SlideBench-VQA (TCGA) of SlideChat (arXiv:2410.11761): multiple choice about slides."""
    questions = read_slidebench(data_path, image_folder, "tcga", prompt)
    return Benchmark("slidebench-tcga", questions, scoring.score_choices, "slidebench_result.json")


@EVALUATIONS.register("slidebench-bcnb")
def slidebench_bcnb(
    data_path: StrPath, image_folder: ImageFolder | None = None, *, prompt: str = DEFAULT_PROMPT
) -> Benchmark:
    """SlideBench-VQA (BCNB) of SlideChat (arXiv:2410.11761): multiple choice about biopsies."""
    questions = read_slidebench(data_path, image_folder, "bcnb", prompt)
    return Benchmark("slidebench-bcnb", questions, scoring.score_choices, "slidebench_result.json")


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
                f"{data_path} is a folder: name the config of its classes by --option classes=NAME"
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

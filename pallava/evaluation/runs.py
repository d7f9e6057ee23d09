"""Runs one evaluation from questions to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallava.evaluation.audit import audit
from pallava.evaluation.benchmarks import Benchmark
from pallava.evaluation.generation import Outcome, generate_answers
from pallava.evaluation.models import Model
from pallava.evaluation.report import Compat, write_report
from pallava.inference.assistant import MAX_NEW_TOKENS
from pallava.records.questions import Question, SlideFeatures
from pallava.registry import EVALUATIONS
from pathcore.files import StrPath

ANSWERS_FOLDER = "answers"
"""Sub-folder of the work folder with the answers so far."""

DIGESTS_PATH = "images/digests.json"
"""File in the work folder that caches image digests, which saves resumed runs from rereading."""


def evaluate(
    benchmark: Benchmark | str,
    model: Model,
    work_dir: StrPath,
    *,
    data: StrPath | None = None,
    image_folder: StrPath | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    compat: Compat = "none",
    audited: bool = False,
) -> dict[str, Any] | None:
    """Asks a benchmark's questions, scores the answers and writes the report; resumes earlier runs.

    Args:
        benchmark: Name of a benchmark (`pathvqa`, `pmcvqa`, `zero-shot`, or one of a plug-in), or a
            benchmark as an entry of `pallava.registry.EVALUATIONS` returns it.
        model: Model that answers, as returned by `pallava.load_model`.
        work_dir: Output folder for answers and report.
        data: Data of a benchmark given by name.
        image_folder: Folder of its images, if they are elsewhere.
        options: Its own options, such as `prompt`.
        batch_size: Number of questions per batch.
        max_new_tokens: Maximum length of each answer in tokens.
        compat: `original` lists the published scores first; combine it with `bos="double"`.
        audited: Whether to ask the questions in the arms of `pallava.evaluation.audit` as well.

    Returns:
        The content of `metrics.json` on rank 0, None on other ranks.

    Raises:
        ValueError: If the name is unknown, or given without data, or if the questions are about
            slides and the model reads images, or vice versa.
    """
    if isinstance(benchmark, str):
        make = EVALUATIONS.get(benchmark)
        if data is None:
            raise ValueError(f"benchmark {benchmark!r}: expected its data, as data=FOLDER_OR_FILE")
        named: Benchmark = make(data, image_folder, **(options or {}))
        benchmark = named
    elif data is not None or image_folder is not None or options:
        raise ValueError("data, image_folder and options belong to a benchmark given by name")
    _check_inputs(benchmark, model)
    work_dir = Path(work_dir)

    def ask(questions: Sequence[Question]) -> Outcome | None:
        return generate_answers(
            model,
            questions,
            work_dir / ANSWERS_FOLDER,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            digests_path=work_dir / DIGESTS_PATH,
        )

    settings = {**model.settings, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    outcome, metrics = ask(benchmark.questions.questions), None
    if outcome is not None:
        metrics = write_report(
            benchmark,
            outcome.answers,
            [*benchmark.questions.skipped, *outcome.skipped],
            work_dir,
            refusals=outcome.refusals,
            tokenizer=model.tokenizer,
            compat=compat,
            settings=settings,
        )
    if audited:
        audit(benchmark, ask, work_dir, settings=settings)
    return metrics


def _check_inputs(benchmark: Benchmark, model: Model) -> None:
    images = [question.image for question in benchmark.questions.questions if question.image]
    num_slides = sum(isinstance(image, SlideFeatures) for image in images)
    if num_slides and not model.reads_slides:
        raise ValueError(
            f"{benchmark.name}: {num_slides} questions are about tile features of slides, and this "
            "model reads images; name a folder of overview pictures (SLIDE.png) with --image-folder"
        )
    if images and model.reads_slides and not num_slides:
        raise ValueError(
            f"{benchmark.name}: the questions are about images, and this model reads tile features "
            "of whole slides (SLIDE.h5)"
        )

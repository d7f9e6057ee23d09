"""Runs one evaluation from questions to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallava.evaluation.benchmarks import Benchmark
from pallava.evaluation.generation import generate_answers
from pallava.evaluation.models import Model
from pallava.evaluation.report import Compat, write_report
from pallava.inference.assistant import MAX_NEW_TOKENS
from pathcore.files import StrPath

ANSWERS_FOLDER = "answers"
"""Sub-folder of the work folder with the answers so far."""

DIGESTS_PATH = "images/digests.json"
"""File in the work folder that caches image digests, which saves resumed runs from rereading."""


def evaluate(
    benchmark: Benchmark,
    model: Model,
    work_dir: StrPath,
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    compat: Compat = "none",
) -> dict[str, Any] | None:
    """Asks a benchmark's questions, scores the answers and writes the report; resumes earlier runs.

    Args:
        benchmark: Benchmark, as returned by an entry of `pallava.registry.EVALUATIONS`.
        model: Model that answers, as returned by `pallava.load_model`.
        work_dir: Output folder for answers and report.
        batch_size: Number of questions per batch.
        max_new_tokens: Maximum length of each answer in tokens.
        compat: `original` lists the published scores first; combine it with `bos="double"`.

    Returns:
        The content of `metrics.json` on rank 0, None on other ranks.
    """
    work_dir = Path(work_dir)
    outcome = generate_answers(
        model,
        benchmark.questions.questions,
        work_dir / ANSWERS_FOLDER,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        digests_path=work_dir / DIGESTS_PATH,
    )
    if outcome is None:
        return None
    settings = {**model.settings, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return write_report(
        benchmark,
        outcome.answers,
        [*benchmark.questions.skipped, *outcome.skipped],
        work_dir,
        refusals=outcome.refusals,
        tokenizer=model.tokenizer,
        compat=compat,
        settings=settings,
    )

"""One evaluation from questions to report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pallava.evaluation.benchmarks import Benchmark
from pallava.evaluation.generation import generate_answers
from pallava.evaluation.report import Compat, write_report
from pallava.inference.assistant import MAX_NEW_TOKENS, Assistant

ANSWERS_FOLDER = "answers"
"""In the work folder: what was answered so far."""

DIGESTS_PATH = "images/digests.json"
"""In the work folder: digests of the images, so that a resumed run does not read them again."""


def evaluate(
    benchmark: Benchmark,
    assistant: Assistant,
    work_dir: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    compat: Compat = "none",
) -> dict[str, Any] | None:
    """Asks, scores and writes; continues an earlier run in the same folder.

    Args:
        benchmark: From one of `pallava.registry.EVALUATIONS`.
        assistant: The model.
        work_dir: Receives answers and report.
        batch_size: Questions at a time.
        max_new_tokens: Longest answer.
        compat: `original` puts the published scores first; ask with `bos="double"` for it.

    Returns:
        The content of `metrics.json` on the first process, None on the others.
    """
    work_dir = Path(work_dir)
    outcome = generate_answers(
        assistant,
        benchmark.questions.questions,
        work_dir / ANSWERS_FOLDER,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        digests_path=work_dir / DIGESTS_PATH,
    )
    if outcome is None:
        return None
    settings = {
        "prompt_template": assistant.prompt_template,
        "bos": assistant.bos,
        "dtype": str(assistant.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "weights": assistant.fingerprint,
    }
    return write_report(
        benchmark,
        outcome.answers,
        [*benchmark.questions.skipped, *outcome.skipped],
        work_dir,
        tokenizer=assistant.tokenizer,
        compat=compat,
        settings=settings,
    )

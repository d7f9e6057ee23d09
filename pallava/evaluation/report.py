"""Output files of an evaluation: answers, scores as JSON and Markdown, details, skipped rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pallava.evaluation.benchmarks import Benchmark
from pallava.skipping import SKIP_LOG_NAME, SkippedSample
from pathcore.files import remove_partials, write_json, write_text
from pathcore.rows import write_rows

Compat = Literal["none", "original"]
Missing = Literal["wrong", "skip"]

METRICS_NAME, TABLES_NAME, DETAILS_NAME = "metrics.json", "metrics.md", "details.jsonl"


def write_report(
    benchmark: Benchmark,
    answers: Mapping[str, str],
    skipped: Sequence[SkippedSample],
    work_dir: Path,
    *,
    refusals: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    compat: Compat = "none",
    settings: Mapping[str, Any] | None = None,
    judged: Mapping[str, Any] | None = None,
    missing: Missing = "wrong",
) -> dict[str, Any]:
    """Scores answers and writes all output files, each atomically.

    Equal answers give identical files: they contain neither times nor machine-specific paths.

    Args:
        benchmark: Questions and scorer.
        answers: Answers by question id.
        skipped: Questions that could not be asked.
        work_dir: Output folder for the answers (under the benchmark's file name), `metrics.json`,
            `metrics.md`, `details.jsonl` and, if anything was skipped, `skipped_samples.jsonl`.
        refusals: Refusals of the model, by question id; scored as empty answers.
        tokenizer: Tokenizer for the published token recall.
        compat: `original` lists the published scores first.
        settings: Settings with which the answers were generated.
        judged: Scores given by a judge model, if any.
        missing: `wrong` counts a question without an answer as answered incorrectly; `skip`
            excludes it from the denominators. Questions in `skipped` are never counted.

    Returns:
        The content of `metrics.json`.
    """
    refusals = refusals or {}
    work_dir.mkdir(parents=True, exist_ok=True)
    remove_partials(work_dir)  # left by a run that was killed while writing
    result = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
    write_json(work_dir / benchmark.result_name, result)
    if skipped:
        write_rows(work_dir / SKIP_LOG_NAME, map(asdict, skipped))
    else:
        (work_dir / SKIP_LOG_NAME).unlink(missing_ok=True)
    unanswered = _unanswered(benchmark, answers, skipped)
    metrics: dict[str, Any] = {
        "benchmark": benchmark.name,
        "num_questions": len(benchmark.questions.questions) + len(benchmark.questions.skipped),
        "num_answers": len(answers),
        "num_skipped": len(skipped),
        "num_missing": len(unanswered),
        "num_refused": len(refusals),
        "coverage": _coverage(benchmark, skipped),
        "missing": missing,
        "compat": compat,
        "settings": dict(settings or {}),
    }
    # Every scoring rule, including the published ones, counts an empty answer as wrong.
    filled = dict.fromkeys(unanswered, "") if missing == "wrong" else {}
    scored = {**answers, **filled}
    if benchmark.score is not None and scored:
        tables = benchmark.score(benchmark.questions.questions, scored, tokenizer)
        details = tables.pop("details")
        write_rows(work_dir / DETAILS_NAME, _detail_rows(benchmark, scored, details, refusals))
        metrics |= tables
    if judged:
        metrics["judged"] = dict(judged)
    write_json(work_dir / METRICS_NAME, metrics)
    write_text(work_dir / TABLES_NAME, markdown(metrics))
    return metrics


def _detail_rows(
    benchmark: Benchmark,
    answers: Mapping[str, str],
    details: Mapping[str, Mapping[str, Any]],
    refusals: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Yields a row with the score of every question that has one."""
    for question in benchmark.questions.questions:
        if question.id not in details:
            continue
        row = {
            "question_id": question.id,
            "cluster": question.cluster,
            "question": question.text,
            "reference": question.answer,
            "answer": answers[question.id],
            **details[question.id],
        }
        if question.id in refusals:
            row["refusal"] = refusals[question.id]
        yield row


def _coverage(benchmark: Benchmark, skipped: Sequence[SkippedSample]) -> dict[str, dict[str, int]]:
    """Returns how many questions of each subset could be asked, and how many the data has."""
    excused = {sample.id for sample in skipped}
    asked = Counter(
        question.groups.get("subset", "")
        for question in benchmark.questions.questions
        if question.id not in excused
    )
    totals = benchmark.questions.totals
    return {name: {"asked": asked[name], "in the data": totals[name]} for name in totals}


def _unanswered(
    benchmark: Benchmark, answers: Mapping[str, str], skipped: Sequence[SkippedSample]
) -> list[str]:
    """Returns ids of questions that have a reference but neither an answer nor a skip record."""
    excused = {sample.id for sample in skipped}
    return [
        question.id
        for question in benchmark.questions.questions
        if question.answer is not None and question.id not in answers and question.id not in excused
    ]


def markdown(metrics: Mapping[str, Any]) -> str:
    """Formats the content of `metrics.json` as tables."""
    lines = [f"# {metrics['benchmark']}", ""]
    rule = {"wrong": "counted as wrong", "skip": "not counted"}[metrics["missing"]]
    absent = f"{metrics['num_missing']} missing ({rule}), " if metrics["num_missing"] else ""
    refused = f"{metrics['num_refused']} refused, " if metrics["num_refused"] else ""
    lines.append(
        f"{metrics['num_questions']} questions, {metrics['num_answers']} answers, {absent}{refused}"
        f"{metrics['num_skipped']} skipped. Percent; in brackets 95 % bootstrap intervals."
    )
    if metrics["coverage"]:
        lines += ["", "## Denominators", "", *_group_table(metrics["coverage"])]
    ours = _score_tables(metrics)
    original = _published_table(metrics.get("published"))
    sections = [original, ours] if metrics["compat"] == "original" else [ours, original]
    for section in sections:
        lines += section
    for title, key in (
        ("By question type", "by_question_type"),
        ("By answer type", "by_answer_type"),
        ("By class", "by_class"),
        *((f"By {name}", f"by_{name}") for name in metrics.get("groups", ())),
    ):
        if metrics.get(key):
            lines += ["", f"## {title}", "", *_group_table(metrics[key])]
    if "confusion" in metrics:
        lines += ["", "## Confusion", "", *_confusion_table(metrics["confusion"])]
    if "judged" in metrics:
        lines += ["", "## Judged similarity", ""]
        lines += [f"- {name}: {score_text(value)}" for name, value in metrics["judged"].items()]
    if metrics["settings"]:
        lines += ["", "## Settings", ""]
        lines += [f"- {name}: {value}" for name, value in metrics["settings"].items()]
    return "\n".join(lines) + "\n"


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Collects scores by benchmark for a model card.

    Args:
        files: `metrics.json` files, or JSON files of the form that this function returns.

    Returns:
        Scores by benchmark, as `{"PathVQA": {"closed accuracy": 0.9}}`.

    Raises:
        ValueError: If a file has neither form.
    """
    scores: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            content = json.loads(file.read_bytes())
            if "benchmark" in content:
                rows = content.get("scores", {}).items()
                content = {
                    content["benchmark"]: {
                        f"{group}, {name}": score_text(value)
                        for group, values in rows
                        for name, value in values.items()
                    }
                }
            for benchmark, values in content.items():
                scores.setdefault(benchmark, {}).update(values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected {METRICS_NAME} of an evaluation, or an object such as "
                f'{{"PathVQA": {{"closed accuracy": 0.9}}}}: {error}'
            ) from error
    return scores


def _score_tables(metrics: Mapping[str, Any]) -> list[str]:
    if "scores" not in metrics:
        lacking = (
            "The data holds no references"
            if metrics["num_answers"]
            else ("No question has an answer")
        )
        return ["", f"{lacking}: nothing was scored."]
    lines = ["", "## Scores", "", "| group | score | |", "|---|---|---|"]
    for group, scores in metrics["scores"].items():
        lines += [f"| {group} | {name} | {score_text(value)} |" for name, value in scores.items()]
    return lines


def _published_table(published: Any) -> list[str]:
    if not published:
        return []
    lines = ["", "## As the original's tools score", ""]
    for name, value in _flat(published):
        if isinstance(value, str) and "\n" in value:
            lines += ["```", value.rstrip(), "```"]
        else:
            lines.append(f"- {name}: {value}")
    return lines


def _group_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(next(iter(groups.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in groups.items():
        cells = " | ".join(score_text(row[column]) for column in columns)
        lines.append(f"| {_cell(name)} | {cells} |")
    return lines


def _confusion_table(confusion: Mapping[str, Any]) -> list[str]:
    columns = [_cell(name) for name in confusion["predicted"]]
    lines = ["| true \\ predicted | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in zip(confusion["true"], confusion["counts"], strict=True):
        lines.append(f"| {_cell(name)} | " + " | ".join(map(str, row)) + " |")
    return lines


def score_text(value: Any) -> str:
    """Formats a score with its interval, if it has one; other values as they are."""
    if isinstance(value, Mapping) and "value" in value:
        text = f"{value['value']:.2f}"
        return f"{text} ({value['low']:.2f} to {value['high']:.2f})" if "low" in value else text
    return str(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, item in value.items():
        path = f"{prefix}{name}"
        rows += _flat(item, f"{path}, ") if isinstance(item, Mapping) else [(path, item)]
    return rows


def _cell(name: object) -> str:
    return str(name).replace("|", "\\|").replace("\n", " ")

"""Compares models on the questions that all of them were asked, with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallava.evaluation.report import DETAILS_NAME, METRICS_NAME, score_text
from pathcore.files import StrPath
from pathcore.rows import read_lines
from pathcore.stats import mean_interval


def compare(folders: Mapping[str, StrPath]) -> dict[str, Any]:
    """Compares finished evaluations of one benchmark.

    Scores are means of `correct`, which is 0 or 1 by question. Only questions that every model was
    asked count, and differences are those of the same questions, so that their intervals are
    narrower than those of the two scores suggest.

    Args:
        folders: Work folders of `xtuner-add evaluate`, by name of the model; the first is the one
            that the others are compared with.

    Returns:
        `benchmark`, `num_questions` in common, `worded_differently` (their ids, in order),
        `not_shared` by model, and by model its `correct`,
        `difference` from the first, and the numbers of questions that it `gains` and `loses`; all
        in percent with 95 % intervals that resample images or slides.

    Raises:
        FileNotFoundError: If a folder holds no finished evaluation.
        ValueError: If there are fewer than two models, the benchmarks differ, or no question is
            shared.
    """
    if len(folders) < 2:
        raise ValueError(f"expected at least two evaluations to compare, found {len(folders)}")
    benchmarks, asked = {}, {}
    for name, folder in folders.items():
        benchmarks[name], asked[name] = _read(Path(folder))
    if len(set(benchmarks.values())) > 1:
        found = ", ".join(f"{name}: {benchmark}" for name, benchmark in benchmarks.items())
        raise ValueError(f"expected evaluations of one benchmark, found {found}")
    first = next(iter(folders))
    shared = [key for key in asked[first] if all(key in rows for rows in asked.values())]
    if not shared:
        raise ValueError("no question was asked to all models")
    for key in shared:
        references = {rows[key]["reference"] for rows in asked.values()}
        if len(references) > 1:
            raise ValueError(
                f"question {key!r} has the references {', '.join(map(repr, references))}; were the "
                "models asked about different versions of the data?"
            )
    clusters = [asked[first][key]["cluster"] for key in shared]
    baseline = [float(asked[first][key]["correct"]) for key in shared]
    models: dict[str, Any] = {}
    for name, rows in asked.items():
        values = [float(rows[key]["correct"]) for key in shared]
        models[name] = {"correct": _percent(values, clusters)}
        if name != first:
            gaps = [mine - theirs for mine, theirs in zip(values, baseline, strict=True)]
            models[name] |= {
                "difference": _percent(gaps, clusters),
                "gains": sum(gap > 0 for gap in gaps),
                "loses": sum(gap < 0 for gap in gaps),
            }
    return {
        "benchmark": benchmarks[first],
        "num_questions": len(shared),
        "num_clusters": len(set(clusters)),
        # Not refused: the prompts of two models may differ on purpose.
        "worded_differently": [
            key for key in shared if len({rows[key].get("question") for rows in asked.values()}) > 1
        ],
        "not_shared": {name: len(rows) - len(shared) for name, rows in asked.items()},
        "models": models,
    }


def markdown(comparison: Mapping[str, Any]) -> str:
    """Formats the result of `compare` as a table."""
    first, *_ = comparison["models"]
    lines = [
        f"# {comparison['benchmark']}",
        "",
        f"{comparison['num_questions']} questions that all models were asked, about "
        f"{comparison['num_clusters']} images or slides. Percent; in brackets 95 % bootstrap "
        "intervals over images or slides, paired for differences.",
        "",
        *_wording_note(comparison["worded_differently"]),
        f"| model | correct | difference from {first} | gains | loses | not shared |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in comparison["models"].items():
        cells = [score_text(row["correct"]), *(score_text(row.get(key, "")) for key in
                 ("difference", "gains", "loses"))]  # fmt: skip
        unshared = comparison["not_shared"][name]
        lines.append(f"| {name} | {' | '.join(cells)} | {unshared} |")
    return "\n".join(lines) + "\n"


def _wording_note(ids: Sequence[str]) -> list[str]:
    if not ids:
        return []
    return [
        f"**{len(ids)} of these questions were worded differently for the models, the first: "
        f"{ids[0]!r}. Unless their prompts differ on purpose, they answered different versions of "
        f"the data: compare `question` in {DETAILS_NAME}.**",
        "",
    ]


def _read(folder: Path) -> tuple[str, dict[str, Any]]:
    metrics, details = folder / METRICS_NAME, folder / DETAILS_NAME
    for file in (metrics, details):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; is {folder} a finished evaluation?")
    rows = {row["question_id"]: row for _, row in read_lines(details) if isinstance(row, Mapping)}
    return str(json.loads(metrics.read_bytes())["benchmark"]), rows


def _percent(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    score = {"value": 100 * sum(values) / len(values)}
    if len(set(clusters)) > 1:  # questions about a single image say nothing about others
        low, high = mean_interval(values, clusters)
        score |= {"low": 100 * low, "high": 100 * high}
    return score

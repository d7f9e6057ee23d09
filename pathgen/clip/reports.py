"""Reports of a CLIP's scores: `metrics.md`, `metrics.json`, `skipped.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathcore.files import write_json, write_text
from pathcore.rows import write_rows

METRICS_NAME = "metrics.json"
TABLES_NAME = "metrics.md"
SKIPPED_NAME = "skipped.jsonl"

SCORE_HEAD = ("| score | value | 95 % interval |", "|---|---|---|")


def head(metrics: Mapping[str, Any], what: str) -> list[str]:
    """Returns the first lines of a report: task, model, what was scored, what was skipped."""
    skipped = metrics["num_skipped"]
    lines = [
        f"# {metrics['benchmark']}: {metrics['task']}",
        "",
        f"Model: `{metrics['model']}`; {what}.",
    ]
    if skipped:
        lines.append(f"{skipped} skipped: see {SKIPPED_NAME}.")
    if cut := metrics.get("num_cut"):
        lines.append(f"{cut} texts are too long for the text tower, which reads their beginning.")
    return [*lines, ""]


def score_row(name: str, score: Mapping[str, float]) -> str:
    """Returns the row of a score with its interval."""
    label = name.replace("_", " ")
    return f"| {label} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} |"


def write_report(
    out: Path, metrics: Mapping[str, Any], tables: str, skipped: Sequence[Mapping[str, Any]]
) -> None:
    """Writes `skipped.jsonl`, `metrics.md` and, last, `metrics.json`."""
    write_rows(out / SKIPPED_NAME, skipped)
    write_text(out / TABLES_NAME, tables)
    write_json(out / METRICS_NAME, metrics)

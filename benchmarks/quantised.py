"""Measures what quantising the language model costs in accuracy, on the demo's held-out questions.

Run by ``python -m benchmarks.quantised --demo work_dirs/demo`` after ``make demo``. The exported
model and its copies in 8 and 4 bits, which ``xtuner-add quantise`` writes, answer the same
questions. Intervals are 95 % bootstrap intervals over slides, and differences are paired.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate

from pathcore.stats import mean_interval
from xtuner_add.demo.pallava import wording
from xtuner_add.demo.pallava.answers import ask, is_right
from xtuner_add.demo.stages import read_jsonl

BITS = (8, 4)
FULL = "as exported"
_MIB = 2**20


def quantise(model: Path, out: Path, bits: int) -> None:
    """Writes a copy of a model in 8 or 4 bits, unless it is there."""
    if not (out / "config.json").is_file():
        command = [sys.executable, "-m", "xtuner_add.cli", "quantise", str(model), str(out)]
        subprocess.run([*command, "--bits", str(bits), "--device", "cpu"], check=True)


def size_mib(model: Path) -> float:
    """Returns the size of a model's weights."""
    return sum(file.stat().st_size for file in model.rglob("*.safetensors")) / _MIB


def compare(
    rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Mapping[int, str]]
) -> list[dict[str, Any]]:
    """Compares every model's answers with those of the model as exported.

    Args:
        rows: The questions.
        answers: Answers by model and number of the question.

    Returns:
        For each model, accuracy of closed and open questions, their difference to the model as
        exported, and the share of equal answers, all with intervals over slides.
    """
    slides = [row["image"] for row in rows]
    right = {
        name: np.array([is_right({**row, "prediction": given[i]}) for i, row in enumerate(rows)])
        for name, given in answers.items()
    }
    closed = np.array([row["kind"] in wording.CLOSED for row in rows])

    def interval(values: Any, part: Any) -> list[float]:
        chosen = np.asarray(values, dtype=float)[part]
        own = [slide for slide, is_in in zip(slides, part, strict=True) if is_in]
        return [float(chosen.mean()), *mean_interval(chosen, own)]

    found = []
    for name, given in answers.items():
        same = [given[i] == answers[FULL][i] for i in range(len(rows))]
        row: dict[str, Any] = {"model": name, "same": interval(same, closed | ~closed)}
        for kind, part in (("closed", closed), ("open", ~closed)):
            row[kind] = interval(right[name], part)
            row[f"{kind}_difference"] = interval(right[name] * 1.0 - right[FULL], part)
        found.append(row)
    return found


def table(found: Sequence[Mapping[str, Any]], sizes: Mapping[str, float]) -> str:
    """Formats the comparison."""

    def cell(values: Sequence[float]) -> str:
        return "{:.3f} ({:.3f} to {:.3f})".format(*values)

    keys = ("closed", "closed_difference", "open", "open_difference", "same")
    rows = [
        [row["model"], f"{sizes[row['model']]:.1f}", *(cell(row[key]) for key in keys)]
        for row in found
    ]
    headers = ["weights", "MiB", "closed", "difference", "open", "difference", "same answer"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


@click.command()
@click.option(
    "--demo",
    type=click.Path(path_type=Path, exists=True),
    default="work_dirs/demo",
    show_default=True,
    help="Work folder of the demo.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
def main(demo: Path, json_path: Path | None) -> None:
    """Quantise the demo's model, ask all models and print the table."""
    from pallava import load_model

    exported = demo / "scale_invariant" / "model"
    folders = {FULL: exported}
    for bits in BITS:
        folders[f"{bits} bits"] = exported.with_name(f"model-{bits}bit")
        quantise(exported, folders[f"{bits} bits"], bits)
    rows = read_jsonl(demo / "data" / "held_out.jsonl")
    images = [row["image"] for row in rows]
    answers = {
        name: ask(load_model(folder, device="cpu"), demo, rows, range(len(rows)), images, name)
        for name, folder in folders.items()
    }
    found = compare(rows, answers)
    click.echo(table(found, {name: size_mib(folder) for name, folder in folders.items()}))
    click.echo(f"\n{len(rows)} questions about {len(set(images))} slides")
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

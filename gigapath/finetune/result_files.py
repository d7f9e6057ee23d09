"""Output of probing and fine-tuning: predictions, a table with intervals, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath.finetune.metrics import SURVIVAL, score_predictions
from gigapath.finetune.survival import kaplan_meier_figure
from pathcore.calibration import reliability_figure
from pathcore.figures import save_figure
from pathcore.files import StrPath
from pathcore.rows import write_csv

SKIPPED_NAME = "skipped.jsonl"
RESULTS_NAME, TABLE_NAME = "results.json", "results.md"

SHOWN = {
    "multi_class": (
        "auroc",
        "auprc",
        "balanced_accuracy",
        "accuracy",
        "macro_f1",
        "quadratic_kappa",
        "ece",
    ),
    "binary": ("auroc", "auprc", "balanced_accuracy", "accuracy", "macro_f1", "weighted_f1", "ece"),
    "multi_label": ("auroc", "auprc", "micro_auroc", "micro_auprc", "balanced_accuracy", "ece"),
    SURVIVAL: ("c_index",),
}
"""Scores in the columns of the table, by setting."""


def score_part(
    folder: Path,
    part: str,
    ids: Sequence[str],
    labels: NDArray[Any],
    probabilities: NDArray[Any],
    classes: Sequence[str],
    setting: str,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Scores the predictions of a part and writes them to `predictions_PART.csv`.

    The csv has ids, true and predicted classes (multi-label: 0 or 1) and probabilities; for
    survival, ids, times, events and risks. The part `test` also gets a picture, `reliability.png`
    or `kaplan_meier.png`. See `gigapath.finetune.metrics.score_predictions` for the scores.
    """
    rows: list[list[Any]] = []
    if setting == SURVIVAL:
        head = ["time", "event", "risk"]
        for name, (time, event), risk in zip(ids, labels, probabilities[:, 0], strict=True):
            rows.append([name, f"{time:g}", int(event), f"{risk:.6f}"])
    else:
        several = labels.ndim == 2
        head = [f"true_{name}" for name in classes] if several else ["true", "predicted"]
        head += [f"probability_{name}" for name in classes]
        for name, label, row in zip(ids, labels, probabilities, strict=True):
            shown = (
                label.astype(int).tolist() if several else [classes[label], classes[row.argmax()]]
            )
            rows.append([name, *shown, *map("{:.6f}".format, row)])
    write_csv(folder / f"predictions_{part}.csv", ["id", *head], rows)
    if part == "test" and setting == SURVIVAL:
        figure = kaplan_meier_figure(labels, probabilities[:, 0])
        save_figure(figure, folder / "kaplan_meier.png", dpi=120)
    elif part == "test":
        figure = reliability_figure(labels, probabilities, f"{len(ids)} test cases")
        save_figure(figure, folder / "reliability.png", dpi=120)
    return score_predictions(
        labels, probabilities, classes, setting=setting, num_resamples=num_resamples, seed=seed
    )


def results_table(
    title: str, setting: str, rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    head: Sequence[str], notes: Sequence[str] = (),
) -> str:  # fmt: skip
    """Formats scores as a Markdown table.

    Args:
        title: Title above the table.
        setting: One of `gigapath.finetune.metrics.SETTINGS`, or `SURVIVAL`.
        rows: First cells of each row, and the result of `score_predictions` or `spread`.
        head: Titles of the first cells.
        notes: Paragraphs below the table.
    """
    names = SHOWN[setting]
    lines = [f"# {title}", "", "In brackets 95 % bootstrap intervals over test cases.", ""]
    lines.append(f"| {' | '.join((*head, 'cases', *names))} |")
    lines.append("|---" * (len(head) + 1 + len(names)) + "|")
    for cells, scores in rows:
        shown = [_cell(scores[name]) for name in names]
        lines.append(f"| {' | '.join((*cells, str(scores.get('num_cases', '')), *shown))} |")
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def shots_table(
    title: str,
    rows: Sequence[tuple[str, str, Mapping[str, Any]]],
    names: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """Formats scores of k-shot runs as a Markdown table.

    Args:
        title: Title above the table.
        rows: Method, number of shots, and scores; see `gigapath.finetune.protocols.score_shots`.
        names: Scores in the columns.
        notes: Paragraphs below the table.
    """
    lines = [
        f"# {title}",
        "",
        "Means over draws of training cases, with 95 % bootstrap intervals of the mean over draws.",
        "",
        f"| {' | '.join(('method', 'shots', 'draws', *names))} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for method, number, scores in rows:
        cells = (method, number, str(scores["num_repeats"]), *(_cell(scores[n]) for n in names))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def spread(runs: Sequence[Mapping[str, Any]], setting: str) -> dict[str, Any]:
    """Returns mean and standard deviation of each score over the runs that define it."""
    found: dict[str, Any] = {}
    for name in SHOWN[setting]:
        values = [run[name]["value"] for run in runs if run[name]["value"] is not None]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        mean = float(np.mean(values)) if values else None
        found[name] = {"mean": mean, "std": std, "num_runs": len(values)}
    return found


def draw_curves(
    path: StrPath,
    history: Sequence[Mapping[str, Any]],
    *,
    step: str,
    losses: Sequence[str],
    scores: Sequence[str],
    chosen: float | None = None,
) -> None:
    """Plots losses, scores and learning rate of a training as PNG.

    Args:
        path: The PNG.
        history: Rows with `step`, `lr` and some of the names below.
        step: Key of the horizontal axis.
        losses: Keys in the left panel.
        scores: Keys in the middle panel, from 0 to 1.
        chosen: Step of the selected model, marked by a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (("loss", losses), ("score on validation", scores), ("learning rate", ("lr",)))
    for axes, (label, names) in zip(figure.subplots(1, 3), panels, strict=True):
        drawn = False
        for name in names:
            points = [(row[step], row[name]) for row in history if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
                drawn = True
        axes.set(xlabel=step, ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if names is scores and drawn:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
        axes.grid(alpha=0.3)
        if chosen is not None:
            axes.axvline(chosen, color="grey", linestyle=":", label="model kept")
        if drawn:
            axes.legend(fontsize="small")
    save_figure(figure, path, dpi=120)


def _cell(score: Mapping[str, float | None]) -> str:
    if "mean" in score:
        std = "" if score["std"] is None else f" ± {score['std']:.3f}"
        return "-" if score["mean"] is None else f"{score['mean']:.3f}{std}"
    if score["value"] is None:
        return "-"
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"

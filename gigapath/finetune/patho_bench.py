"""Tasks of Patho-Bench as published (Zhang et al. 2025, https://arxiv.org/abs/2502.06750).

A task is a folder with `config.yaml` and `k=all.tsv`, for some tasks also `k=1.tsv` and so on with
few training samples. The table has a row per slide with `case_id`, `slide_id`, the label and, for
each fold, `train` or `test`. A sample is a slide or all slides of a case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.finetune.recipes import read_yaml
from gigapath.finetune.splits import PARTS, Split
from gigapath.finetune.tasks import (
    CLAM_PATIENT_KEY,
    SLIDE_KEY,
    LabelledSlides,
    SlideTask,
    read_table,
    survival_task,
)
from pathcore.files import StrPath, UnsafeNameError, check_name

TABLE_NAME, CONFIG_NAME = "k=all.tsv", "config.yaml"


@dataclass(frozen=True)
class PathoBenchTask:
    """A task with its samples and folds.

    Attributes:
        task: What is predicted.
        labelled: Samples with their labels and, where samples are slides, patients.
        splits: Samples of each fold; `val` is empty unless the table has been edited.
        slides: Slides of each sample.
    """

    task: SlideTask
    labelled: LabelledSlides
    splits: Mapping[int, Split]
    slides: Mapping[str, tuple[str, ...]]


def read_patho_bench(path: StrPath) -> PathoBenchTask:
    """Reads a task.

    Args:
        path: Folder of the task, or one of its tables.

    Raises:
        FileNotFoundError: If the table or `config.yaml` does not exist.
        ValueError: If fields or columns are missing, a sample has several labels or is in several
            parts of a fold, or a slide has two ids or two patients.
    """
    table = Path(path) / TABLE_NAME if Path(path).is_dir() else Path(path)
    config = read_yaml(table.parent / CONFIG_NAME)
    column, sample_column = (_text(config, name, table.parent) for name in _REQUIRED)
    task, names = _task(config, column, f"{table.parent.parent.name}/{table.parent.name}")
    rows = read_table(table, (SLIDE_KEY, sample_column, *task.columns()), separator="\t")
    folds = {
        int(match[1]): name
        for name in (rows[0] if rows else ())
        if (match := re.fullmatch(r"fold_(\d+)", name))
    }
    if not folds:
        raise ValueError(f"table {table}: expected columns fold_0, fold_1 ..., found none")
    labels: dict[str, Any] = {}
    slides: dict[str, list[str]] = {}
    patients, skipped = {}, []
    known: dict[str, tuple[str, str]] = {}
    parts: dict[int, dict[str, str]] = {fold: {} for fold in folds}
    for row in rows:
        sample = row[sample_column]
        try:
            check_name(row[SLIDE_KEY], room_bytes=len(".h5"))
            value = row[column] if not task.is_survival else ""
            label = task.encode({**row, column: names.get(value, value)})
        except (UnsafeNameError, ValueError) as error:
            skipped.append({"id": row[SLIDE_KEY], "reason": str(error)})
            continue
        # Both ids have the same features, which could be trained on and tested at once.
        own_id = row[SLIDE_KEY], row.get(CLAM_PATIENT_KEY) or sample
        first_id = known.setdefault(row[SLIDE_KEY].removesuffix(".svs"), own_id)
        if first_id != own_id:
            first, other = (f"{slide} of {patient}" for slide, patient in (first_id, own_id))
            raise ValueError(
                f"table {table}: {first} and {other} are one slide; keep the row that is right"
            )
        if labels.setdefault(sample, label).tolist() != label.tolist():
            raise ValueError(f"table {table}: {sample_column} {sample} has two labels")
        if row[SLIDE_KEY] not in slides.setdefault(sample, []):
            slides[sample].append(row[SLIDE_KEY])
        if sample_column == SLIDE_KEY and row.get(CLAM_PATIENT_KEY):
            patients[sample] = row[CLAM_PATIENT_KEY]
        for fold, name in folds.items():
            part = row[name].lower()
            if part not in (*PARTS, "", "nan"):
                raise ValueError(
                    f"table {table}: {name} of {sample}: expected one of {', '.join(PARTS)}, "
                    f"found {row[name]!r}"
                )
            if parts[fold].setdefault(sample, part) != part:
                raise ValueError(f"table {table}: {sample_column} {sample} in two parts of {name}")
    if not labels:
        raise ValueError(f"table {table}: no row can be used: {skipped[:1] or 'it is empty'}")
    splits = {
        fold: Split(*(tuple(s for s, own in parts[fold].items() if own == part) for part in PARTS))
        for fold in sorted(folds)
    }
    return PathoBenchTask(
        task,
        LabelledSlides(labels, patients, tuple(skipped)),
        splits,
        {sample: tuple(own) for sample, own in slides.items()},
    )


_REQUIRED = ("task_col", "sample_col")


def _text(config: Mapping[str, Any], name: str, folder: Path) -> str:
    value = config.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{folder / CONFIG_NAME}: {name}: expected a column, found {value!r}")
    return value


def _task(config: Mapping[str, Any], column: str, name: str) -> tuple[SlideTask, dict[str, str]]:
    """Returns the task, and the name of each value in the column of labels."""
    extra = config.get("extra_cols") or []
    times = f"{column}_days", f"{column}_event"
    if config.get("task_type") == "survival" or set(times) <= set(extra):
        return survival_task(name, *times), {}
    numbers = config.get("label_dict")
    if not isinstance(numbers, Mapping) or len(numbers) < 2:
        raise ValueError(f"{name}: label_dict: expected labels with their numbers, found {numbers}")
    # Published files have both directions, 0: negative and negative: 0.
    pairs = [(str(k), str(v)) for k, v in numbers.items()]
    if not all(number.isdigit() for number, _ in pairs):
        pairs = [(number, label) for label, number in pairs]
    if not all(number.isdigit() for number, _ in pairs):
        raise ValueError(f"{name}: label_dict: expected labels with their numbers, found {numbers}")
    pairs.sort(key=lambda pair: int(pair[0]))
    setting = "binary" if len(pairs) == 2 else "multi_class"
    # Excel and pandas write 1 as 1.0 in columns with missing values.
    names = dict(pairs) | {f"{number}.0": label for number, label in pairs}
    labels = tuple(label for _, label in pairs)
    return SlideTask(name, setting, labels, label_column=column), names

"""Tasks in the published file format, and tables of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath.finetune.metrics import SETTINGS, SURVIVAL
from gigapath.finetune.recipes import read_yaml
from gigapath.published.embedding_zip import class_names
from pathcore.files import StrPath, UnsafeNameError, check_name
from pathcore.label_tables import is_missing
from pathcore.names import did_you_mean

SLIDE_KEY, PATIENT_KEY = "slide_id", "pat_id"
"""Columns of the published tables."""

CLAM_PATIENT_KEY = "case_id"
"""Column of patients in CLAM's tables, read where there is no `pat_id`."""

_FIELDS = {"name", "setting", "label_dict", "max_tiles", "shuffle_tiles", "add_metrics"}
_FIELDS |= {"time_column", "event_column"}


@dataclass(frozen=True)
class SlideTask:
    """Definition of a task.

    Attributes:
        name: Name of the task.
        setting: `multi_class` or `binary`: `label_column` holds one of the classes. `multi_label`:
            each class has a column of 0 and 1. `survival`: `time_column` and `event_column`.
        classes: Values of the labels, or names of the columns, in the order of the model's outputs;
            `risk` for `survival`.
        max_tiles: Maximum number of tiles per slide; 0 for all.
        label_column: Column of the labels in `multi_class` and `binary`.
        time_column: Column of the time to the event or to the end of observation.
        event_column: Column of 1 for an observed event and 0 for a censored case.
        shuffle_tiles: Whether tiles come in random order. Only `protocol: published` does so,
            because the slide encoder depends on the order.
    """

    name: str
    setting: str
    classes: tuple[str, ...]
    max_tiles: int = 0
    shuffle_tiles: bool = False
    label_column: str = "label"
    time_column: str = ""
    event_column: str = ""

    @property
    def several_labels(self) -> bool:
        """Whether a slide may have several classes, or none."""
        return self.setting == "multi_label"

    @property
    def is_survival(self) -> bool:
        """Whether the model predicts the risk of an event."""
        return self.setting == SURVIVAL

    def columns(self) -> tuple[str, ...]:
        """Returns the label columns of a table."""
        if self.is_survival:
            return self.time_column, self.event_column
        return self.classes if self.several_labels else (self.label_column,)

    def encode(self, row: Mapping[str, str]) -> NDArray[Any]:
        """Encodes the labels of a row as class index `()`, or as 0 and 1 `(num_classes,)`.

        For `survival`, as float time and event `(2,)`. An event may be written as cBioPortal does,
        `1:DECEASED`.

        Raises:
            ValueError: If a label is not one of the task's.
        """
        if self.is_survival:
            time, event = (_as_text(row[name]) for name in self.columns())
            if not _is_time(time):
                raise ValueError(f"{self.time_column} {time!r}: expected a number of at least 0")
            observed = _EVENTS.get(event.split(":")[0].lower())
            if observed is None:
                raise ValueError(f"{self.event_column} {event!r}: expected 0 or 1")
            return np.array([float(time), observed], dtype=np.float64)
        if self.several_labels:
            values = [_as_text(row[name]) for name in self.classes]
            for name, value in zip(self.classes, values, strict=True):
                if value not in ("0", "1"):
                    raise ValueError(f"label {name}: expected 0 or 1, found {value!r}")
            return np.array(values, dtype=np.int64)
        value = _as_text(row[self.label_column])
        if value not in self.classes:
            raise ValueError(
                f"{self.label_column} {value!r}: expected one of {', '.join(self.classes)}"
            )
        return np.array(self.classes.index(value))


_EVENTS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


def _is_time(value: str) -> bool:
    try:
        return 0 <= float(value) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True)
class LabelledSlides:
    """Labelled slides of a table.

    Attributes:
        labels: Label of each slide, see `SlideTask.encode`.
        patients: Patient of each slide; empty if the table has no column of patients.
        skipped: `id` and `reason` of rows that cannot be used.
    """

    labels: Mapping[str, NDArray[Any]]
    patients: Mapping[str, str]
    skipped: tuple[dict[str, str], ...]

    def known_as(self, slide: str) -> str:
        """Returns the id that the labels have for a slide, with or without `.svs`."""
        stem = slide.removesuffix(".svs")
        return next((s for s in (slide, stem, f"{stem}.svs") if s in self.labels), slide)

    def stratum(self, slide: str) -> int:
        """Returns what folds should have equally often: the class, or the event of `survival`."""
        label = self.labels[slide]
        if label.ndim == 0:
            return int(label)
        # Combinations of several labels are too rare to be stratified.
        return int(label[1]) if label.dtype.kind == "f" else 0


def read_task(path: StrPath) -> SlideTask:
    """Reads a task file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a field is missing, unknown or of the wrong type.
    """
    content = read_yaml(path)
    if unknown := sorted(set(content) - _FIELDS):
        raise ValueError(f"task {path}: no field {unknown[0]!r}{did_you_mean(unknown[0], _FIELDS)}")
    setting = content.get("setting", "multi_class")
    if setting not in (known := (*SETTINGS, SURVIVAL)):
        raise ValueError(f"task {path}: setting {setting!r}: expected one of {', '.join(known)}")
    max_tiles = content.get("max_tiles", 0)
    if not isinstance(max_tiles, int) or max_tiles < 0:
        raise ValueError(f"task {path}: max_tiles {max_tiles!r}: expected a whole number")
    name, shuffle = str(content.get("name", Path(path).stem)), bool(content.get("shuffle_tiles"))
    columns = [str(content.get(key, "")) for key in ("time_column", "event_column")]
    if setting == SURVIVAL:
        if not all(columns):
            raise ValueError(f"task {path}: survival: expected time_column and event_column")
        return survival_task(name, *columns, max_tiles=max_tiles, shuffle_tiles=shuffle)
    if any(columns):
        raise ValueError(f"task {path}: time_column and event_column: only with setting survival")
    numbers = content.get("label_dict")
    if not isinstance(numbers, dict) or len(numbers) < (1 if setting == "multi_label" else 2):
        raise ValueError(f"task {path}: label_dict: expected labels with their numbers")
    if sorted(map(str, numbers.values())) != sorted(map(str, range(len(numbers)))):
        raise ValueError(
            f"task {path}: label_dict: expected each number from 0 to {len(numbers) - 1} once, "
            f"found {list(numbers.values())}"
        )
    if setting == "binary" and len(numbers) != 2:
        raise ValueError(f"task {path}: binary: expected 2 labels, found {len(numbers)}")
    classes = sorted(numbers, key=lambda name: int(numbers[name]))
    return SlideTask(
        name, setting, tuple(_as_text(str(name)) for name in classes), max_tiles, shuffle
    )


def survival_task(name: str, time_column: str, event_column: str, **options: Any) -> SlideTask:
    """Makes a survival task; `options` are further fields of `SlideTask`."""
    return SlideTask(
        name, SURVIVAL, ("risk",), time_column=time_column, event_column=event_column, **options
    )


def task_of_table(path: StrPath, label: str = "label") -> SlideTask:
    """Makes a task from a table, with the sorted values of a column as classes.

    Args:
        path: csv with `slide_id` and the column.
        label: Column of the labels. Numbers are ordered as numbers, other values alphabetically.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If a column is missing, a label is missing, or there is only one class.
    """
    found = {_as_text(row[label]) for row in read_table(path, (SLIDE_KEY, label))}
    classes = class_names(found)
    if len(classes) < 2 or any(map(is_missing, found)):
        raise ValueError(
            f"table {path}: column {label} must hold at least two classes, and neither empty cells "
            f"nor nan or NA; found {list(classes)}; remove the slides without a label"
        )
    setting = "binary" if len(classes) == 2 else "multi_class"
    return SlideTask(label, setting, classes, label_column=label)


def read_labels(path: StrPath, task: SlideTask, *, slide_key: str = SLIDE_KEY) -> LabelledSlides:
    """Reads a csv of slides: ids, labels and, in column `pat_id` or CLAM's `case_id`, patients.

    Ids that differ in the suffix `.svs` name one slide; the first of them is kept.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If columns are missing, a slide has two labels or patients, or no row can be
            used.
    """
    labels: dict[str, NDArray[Any]] = {}
    patients: dict[str, str] = {}
    first_ids: dict[str, str] = {}
    skipped = []
    for row in read_table(path, (slide_key, *task.columns())):
        slide = row[slide_key]
        try:
            check_name(slide, room_bytes=len(".h5"))
            label = task.encode(row)
        except (UnsafeNameError, ValueError) as error:
            skipped.append({"id": slide, "reason": str(error)})
            continue
        slide = first_ids.setdefault(slide.removesuffix(".svs"), slide)
        if slide in labels and not np.array_equal(labels[slide], label):
            raise ValueError(
                f"table {path}: slide {slide} has two labels, "
                f"{_label_text(task, labels[slide])} and {_label_text(task, label)}"
            )
        labels[slide] = label
        patient = row.get(PATIENT_KEY) or row.get(CLAM_PATIENT_KEY)
        if patient and patients.setdefault(slide, patient) != patient:
            raise ValueError(
                f"table {path}: slide {slide} has patients {patients[slide]} and {patient}"
            )
    if not labels:
        first = skipped[0] if skipped else "it is empty"
        raise ValueError(f"table {path}: no row can be used: {first}")
    return LabelledSlides(labels, patients, tuple(skipped))


def read_table(
    path: StrPath, columns: Sequence[str], *, separator: str = ","
) -> list[dict[str, str]]:
    """Reads a table as text, so that ids keep their leading zeros.

    Args:
        path: The file.
        columns: Columns that it must have.
        separator: Character between cells.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If it is not a csv, or columns are missing.
    """
    import pandas as pd

    if not Path(path).is_file():
        raise FileNotFoundError(f"table {path}: no such file")
    try:
        frame = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"table {path}: cannot be read: {error}") from error
    if absent := [name for name in columns if name not in frame.columns]:
        raise ValueError(f"table {path}: no columns {absent}, only {list(frame.columns)}")
    records: list[dict[str, Any]] = frame.to_dict("records")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in records]


def _label_text(task: SlideTask, label: NDArray[Any]) -> str:
    return str(label.tolist()) if label.ndim else task.classes[int(label)]


def _as_text(value: str) -> str:
    """Normalises a label: pandas and Excel write 1 as 1.0 in columns with missing values."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value

"""Slides with labels, splits as CLAM publishes them, and the features of their patches."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pathcore.files import check_name
from wsi.store import read_features

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Slides of a fold; no slide and no patient stands in two parts."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def without(self, slides: set[str]) -> Split:
        """The split without some slides."""
        return Split(*(tuple(s for s in getattr(self, p) if s not in slides) for p in PARTS))


@dataclass(frozen=True)
class SlideLabels:
    """Classes of slides.

    Attributes:
        classes: Names, in alphabetical order, or as numbers in theirs.
        by_slide: Slide -> class from 0.
        patients: Slide -> patient; empty where the table names none.
    """

    classes: tuple[str, ...]
    by_slide: Mapping[str, int]
    patients: Mapping[str, str]


def read_labels(path: str | os.PathLike[str], *, label: str = "label") -> SlideLabels:
    """Reads a table with `slide_id`, a label and, where there is one, `case_id`.

    Raises:
        FileNotFoundError: No such table.
        ValueError: Columns that are missing, one slide with two labels, fewer than two classes.
    """
    path = Path(path)
    found: dict[str, str] = {}
    patients: dict[str, str] = {}
    for row in _rows(path, ("slide_id", label)):
        slide = check_name(row["slide_id"])
        if found.setdefault(slide, row[label]) != row[label]:
            raise ValueError(f"{path}: slide {slide} has labels {found[slide]} and {row[label]}")
        if row.get("case_id"):
            patients[slide] = row["case_id"]
    classes = sorted(set(found.values()), key=lambda name: (not name.isdigit(), name.zfill(9)))
    if len(classes) < 2 or "" in classes:
        raise ValueError(f"{path}: two classes at least, none empty, expected; got {classes}")
    number = {name: index for index, name in enumerate(classes)}
    return SlideLabels(tuple(classes), {s: number[v] for s, v in found.items()}, patients)


def read_split(path: str | os.PathLike[str], labels: SlideLabels) -> Split:
    """Reads a fold as CLAM publishes it: columns `train`, `val`, `test` of slides, of any lengths.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Columns that are missing, an empty part, a slide without label, or a slide or
            patient in two parts.
    """
    path = Path(path)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in _rows(path, PARTS):
        for part in PARTS:
            if row[part]:
                parts[part].append(row[part])
    for part, slides in parts.items():
        if not slides:
            raise ValueError(f"{path}: no slides in column {part}")
        if unknown := [slide for slide in slides if slide not in labels.by_slide]:
            raise ValueError(f"{path}: {len(unknown)} slides without label, first {unknown[0]}")
    for what, of in (("slide", {}), ("patient", labels.patients)):
        seen: dict[str, str] = {}
        for part, slides in parts.items():
            for slide in slides:
                key = of.get(slide, slide)
                if seen.setdefault(key, part) != part:
                    raise ValueError(f"{path}: {what} {key} in {seen[key]} and {part}")
    return Split(*(tuple(dict.fromkeys(parts[part])) for part in PARTS))


def find_splits(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The folds `splits_0.csv`, `splits_1.csv`, ... of a folder, by number.

    Raises:
        FileNotFoundError: There is none.
    """
    found = {
        int(path.stem.removeprefix("splits_")): path
        for path in sorted(Path(folder).glob("splits_*.csv"))
        if path.stem.removeprefix("splits_").isdigit()
    }
    if not found:
        raise FileNotFoundError(f"{folder}: holds no splits_0.csv with columns train, val, test")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class FeatureFolder:
    """Features of slides, one HDF5 file each, as `wsi.store` writes them."""

    path: Path

    def file(self, slide: str) -> Path:
        """Where a slide's features lie."""
        return self.path / f"{check_name(slide, room_bytes=3)}.h5"

    def read(self, slide: str) -> tuple[Tensor, np.ndarray]:
        """Features `(N, D)` in fp32 and coordinates `(N, 2)`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No features, or infinities or NaN among them.
        """
        features, coords = read_features(self.file(slide))
        tensor = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
        if not len(tensor):
            raise ValueError(f"features {self.file(slide)}: no patches")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"features {self.file(slide)}: infinities or NaN")
        return tensor, coords

    def check(self, slides: Sequence[str]) -> tuple[int, list[dict[str, str]]]:
        """Width of the features, and `id` and `reason` of slides that cannot be used.

        Raises:
            ValueError: None can be used, or widths differ.
        """
        widths: dict[int, str] = {}
        skipped = []
        for slide in slides:
            try:
                widths.setdefault(self.read(slide)[0].shape[1], slide)
            except (ValueError, OSError) as error:
                skipped.append({"id": slide, "reason": str(error)})
        if not widths:
            raise ValueError(f"{self.path}: features of no slide can be read: {skipped[:1]}")
        if len(widths) > 1:
            shown = ", ".join(f"{width} of {slide}" for width, slide in widths.items())
            raise ValueError(f"{self.path}: features of several widths: {shown}; one encoder each")
        return next(iter(widths)), skipped


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if absent := [column for column in columns if column not in names]:
            raise ValueError(f"{path}: no columns {absent}, only {list(names)}")
        for row in reader:
            yield {str(k): (v or "").strip() for k, v in row.items() if k is not None}

"""Train, validation and test slides: from tables, by k-fold partition, or by the published draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigapath.finetune.tasks import PATIENT_KEY, SLIDE_KEY, LabelledSlides, read_table
from pathcore.files import StrPath, write_text

PARTS = ("train", "val", "test")
METHODS = ("k_fold", "published")

DEFAULT_FOLDS = 10
"""Same value as in the published code."""


@dataclass(frozen=True)
class Split:
    """Slide ids of a fold; `val` may be empty."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def only(self, slides: Mapping[str, object]) -> Split:
        """Returns the split restricted to these slides."""
        return Split(*(tuple(s for s in getattr(self, p) if s in slides) for p in PARTS))


def make_splits(
    labelled: LabelledSlides,
    *,
    method: str = "k_fold",
    folds: int = 0,
    val_r: float = 0.1,
    test_r: float = 0.2,
    split_key: str = "",
    seed: int = 0,
) -> dict[int, Split]:
    """Splits slides into folds; all slides of a patient stay together.

    Args:
        labelled: Slides with labels.
        method: `k_fold`: every slide is tested once, and the validation slides of a fold are the
            test slides of the next. `published`: independent random draws as in the original, so
            that a slide may be tested never or several times.
        folds: Number of folds; 0 for 10.
        val_r: Fraction of validation slides; `k_fold` only looks at whether it is 0.
        test_r: Fraction of test slides; only for `published`.
        split_key: `slide_id` or `pat_id`; by default patients if the table names them.
        seed: Seed of `k_fold`.

    Raises:
        ValueError: If there are too few slides or folds, or no patients.
    """
    keys = _keys(labelled, split_key)
    folds = folds or DEFAULT_FOLDS
    try:
        if method == "published":
            parts = [[*published_split(list(keys), k, val_r, test_r)] for k in range(folds)]
        elif method == "k_fold":
            parts = _k_fold(labelled, keys, folds, val_r > 0, seed)
        else:
            raise ValueError(f"split_method {method!r}: expected one of {', '.join(METHODS)}")
    except ValueError as error:
        raise ValueError(f"{len(keys)} slides or patients in {folds} folds: {error}") from error
    return {number: _slides(keys, split) for number, split in enumerate(parts)}


def published_split(
    keys: Sequence[str], fold: int, val_r: float = 0.1, test_r: float = 0.2
) -> tuple[list[str], list[str], list[str]]:
    """Draws train, validation and test keys as the original does, in its order.

    Args:
        keys: Slides or patients, each once, in the order of the table.
        fold: Number of the fold, which is also the seed.
        val_r: Fraction of validation keys; 0 for none.
        test_r: Fraction of test keys.
    """
    from sklearn.model_selection import train_test_split

    train, rest = train_test_split(list(keys), test_size=val_r + test_r, random_state=fold)
    val: list[str] = []
    test = rest
    if val_r > 0:
        val, test = train_test_split(rest, test_size=test_r / (val_r + test_r), random_state=fold)
    # Back to the order of the table, in which the original has the rows before it shuffles them.
    place = {key: number for number, key in enumerate(keys)}
    ordered = [sorted(part, key=place.__getitem__) for part in (train, val, test)]
    # The original shuffles the training rows once more, with pandas.DataFrame.sample.
    order = np.random.RandomState(fold).choice(len(train), size=len(train), replace=False)
    return [ordered[0][number] for number in order], ordered[1], ordered[2]


def read_splits(
    folder: StrPath,
    labelled: LabelledSlides,
    *,
    folds: int = 0,
    split_key: str = "",
) -> tuple[dict[int, Split], list[dict[str, str]]]:
    """Reads the folds of a folder, in the format published for PANDA or in CLAM's.

    PANDA has `train_0.csv`, `val_0.csv` and `test_0.csv` with a row per slide or patient; CLAM has
    `splits_0.csv` with columns `train`, `val` and `test` of slide ids.

    Args:
        folder: Folder of the tables; `val_K.csv` may be missing.
        labelled: Slides with labels.
        folds: Number of folds, counted from 0; 0 for all.
        split_key: Column of PANDA's tables that identifies a row, `slide_id` or `pat_id`; by
            default patients if both the labels and the tables name them.

    Returns:
        Slides of each fold, and `id`, `reason` of rows whose slide or patient has no label.

    Raises:
        FileNotFoundError: If the folder, its folds or one of the tables does not exist.
        ValueError: If a slide is in two parts, or a patient is and `split_key` is not `slide_id`;
            or if a table of CLAM's names a slide that the labels do not.
    """
    folder = Path(folder)
    clam = not any(folder.glob("train_*.csv"))
    prefix = "splits_" if clam else "train_"
    found = sorted(
        int(path.stem.removeprefix(prefix))
        for path in folder.glob(f"{prefix}*.csv")
        if path.stem.removeprefix(prefix).isdigit()
    )
    if not found:
        raise FileNotFoundError(
            f"splits {folder}: expected train_0.csv, val_0.csv, test_0.csv, or CLAM's splits_0.csv"
        )
    if folds > len(found):
        raise FileNotFoundError(f"splits {folder}: {folds} folds asked for, only {found} there")
    splits, unknown = {}, {}
    for fold in found[: folds or None]:
        if clam:
            splits[fold] = _clam_split(folder / f"splits_{fold}.csv", labelled)
            if split_key != SLIDE_KEY:
                _check_patients(folder, fold, splits[fold], labelled.patients)
            continue
        parts = {part: _part(folder, part, fold, labelled, split_key) for part in PARTS}
        keys = _keys(labelled, split_key if split_key else next(iter(parts.values()))[0])
        what = "patient" if any(key == PATIENT_KEY for key, _ in parts.values()) else "slide"
        _check_disjoint(folder, fold, {part: values for part, (_, values) in parts.items()}, what)
        for part, (key, values) in parts.items():
            for value in values:
                if value not in keys:
                    unknown[value] = {"id": value, "reason": f"{part}_{fold}.csv: {key} no label"}
        splits[fold] = _slides(keys, [values for _, values in parts.values()])
        if not split_key:
            _check_patients(folder, fold, splits[fold], labelled.patients)
    return splits, list(unknown.values())


def write_splits(folder: Path, splits: Mapping[int, Split]) -> None:
    """Writes tables for `read_splits`."""
    folder.mkdir(parents=True, exist_ok=True)
    for fold, split in splits.items():
        for part in PARTS:
            lines = "".join(f"{slide}\n" for slide in getattr(split, part))
            write_text(folder / f"{part}_{fold}.csv", f"{SLIDE_KEY}\n{lines}")


def check_parts(split: Split, fold: int, *, with_val: bool) -> None:
    """Checks that a fold can be trained and tested.

    Raises:
        ValueError: If a required part has no slides.
    """
    for part in PARTS if with_val else ("train", "test"):
        if not getattr(split, part):
            raise ValueError(
                f"fold {fold}: no slide of {part} has a label and usable features"
                + (": model_select val and patience need validation slides" * (part == "val"))
            )


def _keys(labelled: LabelledSlides, split_key: str) -> dict[str, list[str]]:
    """Returns the slides of each slide or patient, in the order of the table."""
    patients = labelled.patients
    split_key = split_key or (PATIENT_KEY if patients else SLIDE_KEY)
    if split_key == SLIDE_KEY:
        return {slide: [slide] for slide in labelled.labels}
    if split_key != PATIENT_KEY:
        raise ValueError(f"split_key {split_key!r}: expected {SLIDE_KEY} or {PATIENT_KEY}")
    if without := [slide for slide in labelled.labels if slide not in patients]:
        raise ValueError(
            f"split_key {PATIENT_KEY}: {len(without)} slides without patient, first {without[0]}; "
            f"set split_key to {SLIDE_KEY} to split slides without regard to patients"
        )
    keys: dict[str, list[str]] = {}
    for slide in labelled.labels:
        keys.setdefault(patients[slide], []).append(slide)
    return keys


def _slides(keys: Mapping[str, list[str]], parts: Sequence[Sequence[str]]) -> Split:
    return Split(*(tuple(s for key in part for s in keys.get(key, ())) for part in parts))


def _k_fold(
    labelled: LabelledSlides, keys: Mapping[str, list[str]], folds: int, with_val: bool, seed: int
) -> list[list[list[str]]]:
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < (3 if with_val else 2):
        raise ValueError(
            "k_fold needs 3 folds, or 2 with val_r 0; give tables of splits, or split_method "
            "published, for fewer"
        )
    slides = [(key, slide) for key, own in keys.items() for slide in own]
    strata = [labelled.stratum(slide) for _, slide in slides]
    groups = [key for key, _ in slides]
    folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    chunks = []
    for _, chosen in folder.split(strata, strata, groups):
        chunks.append(list(dict.fromkeys(groups[number] for number in chosen)))
    parts = []
    for number in range(folds):
        others = [n for n in range(folds) if n != number]
        val = [(number + 1) % folds] if with_val else []
        train = [key for n in others if n not in val for key in chunks[n]]
        parts.append([train, [key for n in val for key in chunks[n]], chunks[number]])
    return parts


def _part(
    folder: Path, part: str, fold: int, labelled: LabelledSlides, split_key: str
) -> tuple[str, list[str]]:
    path = folder / f"{part}_{fold}.csv"
    if part == "val" and not path.is_file():
        return split_key, []
    rows = read_table(path, (split_key,) if split_key else ())
    by_patient = labelled.patients and rows and PATIENT_KEY in rows[0]
    key = split_key or (PATIENT_KEY if by_patient else SLIDE_KEY)
    if rows and key not in rows[0]:
        raise ValueError(f"splits {path}: no column {key}, only {list(rows[0])}")
    values = [row[key] for row in rows]
    if key == SLIDE_KEY:
        values = [labelled.known_as(slide) for slide in values]
    return key, list(dict.fromkeys(values))


def _clam_split(path: Path, labelled: LabelledSlides) -> Split:
    rows = read_table(path, PARTS)
    parts = {part: [labelled.known_as(row[part]) for row in rows if row[part]] for part in PARTS}
    # Rows of the labels that cannot be used are reported as such, so their slides are known here.
    known = {*labelled.labels, *(row["id"] for row in labelled.skipped)}
    for slides in parts.values():
        if unknown := [slide for slide in slides if slide not in known]:
            raise ValueError(
                f"splits {path}: {len(unknown)} slides without label, first {unknown[0]}"
            )
    _check_disjoint(path.parent, int(path.stem.removeprefix("splits_")), parts)
    usable = ([s for s in dict.fromkeys(parts[p]) if s in labelled.labels] for p in PARTS)
    return Split(*map(tuple, usable))


def _check_disjoint(
    folder: Path, fold: int, parts: Mapping[str, Sequence[str]], what: str = "slide"
) -> None:
    seen: dict[str, str] = {}
    for part, values in parts.items():
        for value in values:
            if seen.setdefault(value, part) != part:
                raise ValueError(
                    f"splits {folder}, fold {fold}: {what} {value} in {seen[value]} and {part}"
                )


def _check_patients(folder: Path, fold: int, split: Split, patients: Mapping[str, str]) -> None:
    of_parts = {
        part: sorted({patients[slide] for slide in getattr(split, part) if slide in patients})
        for part in PARTS
    }
    try:
        _check_disjoint(folder, fold, of_parts, "patient")
    except ValueError as error:
        raise ValueError(f"{error}; to allow that, set split_key to {SLIDE_KEY}") from error

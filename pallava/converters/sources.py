"""Reads the published files of datasets row by row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallava.evaluation.questions import RowError
from pallava.rows import read_rows


def read_json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yields `(row number, row)` of a JSON lines file or of a JSON array of any size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is unknown or the array is not valid JSON.
    """
    path = Path(path)
    if path.suffix != ".json":
        yield from ((str(number), row) for number, row in read_rows(path))
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    import ijson

    with path.open("rb") as file:
        rows = ijson.items(file, "item", use_float=True)
        try:
            yield from ((str(number), row) for number, row in enumerate(rows, start=1))
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: no JSON array, or it breaks off near byte {file.tell():,} ({error}); "
                "fetch the file again"
            ) from error


def data_file(path: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """Returns the data file itself, or the first of several names that exists in a folder.

    Raises:
        FileNotFoundError: If there is none; the message lists the names.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise FileNotFoundError(f"{path}: none of {', '.join(names)} in this folder")
    raise FileNotFoundError(f"{path}: no such data file")


def image_root(
    image_folder: str | os.PathLike[str] | None, data: Path, names: Sequence[str] = ()
) -> Path:
    """Returns the given image folder, else the first existing of `names` beside the data."""
    if image_folder is not None:
        return Path(image_folder)
    beside = (data.parent / name for name in names)
    return next((folder for folder in beside if folder.is_dir()), data.parent)


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Returns the row if it is a record.

    Raises:
        RowError: If it is not.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"expected a record, found {row!r:.80}")
    return row


def chosen(text: str) -> frozenset[str]:
    """Splits a comma-separated option into lowercased names; an empty set means all."""
    return frozenset(name.strip().lower() for name in text.split(",") if name.strip())

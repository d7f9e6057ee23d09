"""Reads the files of published benchmarks row by row: JSON, JSON lines, pickle, CSV, parquet."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pathcore import rows
from pathcore.files import StrPath

ID_FIELDS = ("question_id", "qid", "id")
"""Fields that may hold the id of a record in a list, in order of precedence."""


def read_records(path: StrPath) -> Iterator[tuple[str, Any]]:
    """Yields `(id, record)` of a JSON, JSON lines or pickle file.

    The keys of an object are the ids. Records of a list are numbered from 0 unless they have a
    field `question_id`, `qid` or `id`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    if path.suffix == ".jsonl":
        yield from ((_row_id(row, number - 1), row) for number, row in rows.read_lines(path))
        return
    if path.suffix in (".pkl", ".pickle"):
        content = read_plain_pickle(path)
    elif path.suffix == ".json":
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
    else:
        raise ValueError(f"{path}: expected .json, .jsonl, .pkl or .parquet, found {path.suffix!r}")
    if isinstance(content, Mapping):
        yield from ((str(key), row) for key, row in content.items())
    elif isinstance(content, list | tuple):
        yield from ((_row_id(row, number), row) for number, row in enumerate(content))
    else:
        raise ValueError(
            f"{path}: expected an object of id -> record or a list of records, found "
            f"{type(content).__name__}"
        )


def read_csv(path: StrPath) -> Iterator[tuple[str, Any]]:
    """Yields `(row number from 0, {column: text})` of a CSV file with a header.

    A row with the wrong number of fields is yielded as a `BadRow`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a UTF-8 CSV file.
    """
    for number, (_, row) in enumerate(rows.read_csv(path)):
        wrong = None in row or None in row.values()
        bad = rows.BadRow("another number of columns than the header")
        yield str(number), bad if wrong else row


def read_json_rows(path: StrPath) -> Iterator[tuple[str, Any]]:
    """Yields `(row number, row)` of a JSON lines file or of a JSON array of any size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is unknown or the array is not valid JSON.
    """
    yield from ((str(number), row) for number, row in rows.read_rows(path, what="data file"))


def data_file(path: StrPath, names: Sequence[str]) -> Path:
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


def image_root(image_folder: StrPath | None, data: Path, names: Sequence[str] = ()) -> Path:
    """Returns the given image folder, else the first existing of `names` beside the data."""
    if image_folder is not None:
        return Path(image_folder)
    beside = (data.parent / name for name in names)
    return next((folder for folder in beside if folder.is_dir()), data.parent)


def parquet_files(path: StrPath, split: str = "test") -> list[Path]:
    """Returns the parquet files of a split: `path` itself, or `SPLIT-*.parquet` below a folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(path.rglob(f"{split}-*.parquet")) or sorted(path.rglob(f"{split}.parquet"))
    if not found:
        raise FileNotFoundError(f"{path}: no {split}-*.parquet in this folder")
    return found


def read_parquet(
    files: list[Path], image_column: str = "image"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `(row number over all files, record)`; images stay in the file.

    The record field `_parquet` gives the position of the image: `(file, row group, row)`.

    Raises:
        ValueError: If a file is not parquet, or lacks the image column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
        names = file.schema_arrow.names
        if image_column not in names:
            raise ValueError(f"{path}: no column {image_column!r}; found {', '.join(names)}")
        columns = [name for name in names if name != image_column]
        for group in range(file.num_row_groups):
            for row, record in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                yield str(number), {**record, "_parquet": (path, group, row)}
                number += 1


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for lists, dicts, sets, strings and numbers; rejects classes and functions."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(
            f"it wants to call {module_name}.{global_name}; plain data calls nothing"
        )


def read_plain_pickle(path: StrPath) -> Any:
    """Reads a pickle of plain data without executing any code from it.

    Raises:
        ValueError: If the pickle references a class or function, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            _check_memo(file, os.path.getsize(path))
            return _plain_load(file)
        except Exception as error:  # a damaged pickle can raise almost any exception
            raise ValueError(f"{path}: not read as a pickle of plain data: {error}") from error


_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


def _check_memo(file: BinaryIO, num_bytes: int) -> None:
    """Rejects memo indices beyond the file size, up to which the unpickler would allocate memory.

    A pickle of nine bytes can request 16 GB this way. Genuine pickles number their objects from 0,
    and each object takes at least one byte.
    """
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _MEMO_OPCODES and int(argument or 0) > num_bytes:
            raise pickle.UnpicklingError(
                f"it stores an object at index {argument} of its memo, though the file has "
                f"{num_bytes} bytes"
            )
    file.seek(0)


def _plain_load(file: BinaryIO) -> Any:
    return _PlainUnpickler(file, encoding="utf-8").load()


def _row_id(row: Any, number: int) -> str:
    if isinstance(row, Mapping):
        for name in ID_FIELDS:
            if isinstance(row.get(name), str | int):
                return str(row[name])
    return str(number)

"""Reads and writes JSON lines: bad rows are reported, output files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pathcore.files import FolderInUseError, check_name, folder_lock, fsync_path

_SUFFIXES = (".png", ".jpg", ".webp")


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields `(line number, row)`; an invalid line yields the reason instead of a row.

    A valid row is a JSON object with a non-empty string `id`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is one JSON array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as lines:  # as bytes: one line of another encoding is one bad row
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise ValueError(
                    f"{path}: expected JSON lines, one object per line, found an array: "
                    f"jq -c '.[]' {path.name}"
                )
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        line.decode()
        # Half a surrogate pair can be written in JSON but not in UTF-8.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return f"no JSON in UTF-8: {error}"
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    if not isinstance(row.get("id"), str) or not row["id"]:
        return f"id: expected text, found {row.get('id')!r:.80}"
    return row


def _refuse_constant(name: str) -> None:
    """Refuses NaN and infinity, which Python reads and other readers of JSON do not."""
    raise ValueError(f"{name} is not JSON")


def row_digest(row: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a row, independent of the order of its fields."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def path_inside(folder: Path, name: Any) -> Path:
    """Returns the path of the file that a row names.

    Raises:
        ValueError: If the name is not a string, is absolute, or points outside the folder.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"image: expected a file name, found {name!r:.80}")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
        raise ValueError(f"image {name!r:.200}: a path inside the image folder expected")
    return folder / pure


def find_image(folder: Path, row: Mapping[str, Any]) -> Path:
    """Returns the path of a row's image: its `image` field, or else a file named after its id.

    Raises:
        ValueError: If the name points outside the folder, or no file is named after the id.
    """
    if row.get("image") is not None:
        return path_inside(folder, row["image"])
    name = check_name(row["id"], room_bytes=len(".jpeg"))
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise ValueError(f"image: none named, and no {name}{_SUFFIXES[0]}, .jpg or .webp in {folder}")


def write_row(file: IO[str], row: Mapping[str, Any]) -> None:
    """Writes a row as one line of JSON, in UTF-8 rather than escapes."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def row_files(*paths: Path) -> Iterator[list[IO[str]]]:
    """Opens output files that are renamed to their final names together, the first one last.

    Holds a lock on the first file, so that two runs cannot write it at once.

    Raises:
        ValueError: If another run is writing the first file.
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    lock = paths[0].with_name(f".{paths[0].name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(lock))
        except FolderInUseError as error:
            raise ValueError(f"{paths[0]}: another run is writing this file") from error
        files = [stack.enter_context(_whole_file(path)) for path in paths]
        yield files


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """Yields a text file that is renamed to `path` when the body ends.

    The temporary name is constant, which the lock makes safe: a later run overwrites what a killed
    one left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        fsync_path(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)

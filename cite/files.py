"""Output that is whole or absent, whatever moment the process is killed at."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_READ_BYTES = 4 << 20


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; at the end the file is forced to disk and takes its place.

    If the body raises, nothing takes the place, and what was there stays. Missing parent folders
    are made.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.json"
        >>> with atomic_file(target) as partial:
        ...     _ = partial.write_text("{}")
        >>> target.read_text()
        '{}'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _fsync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file that is whole or absent."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file that is whole or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str], *, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        what: What it is, for the error.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{what} {path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} {path}: a JSON object expected, found {type(value).__name__}")
    return value


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

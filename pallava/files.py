"""Atomic output files: a file is written beside its path, fsynced and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

_STAGE = ".staged.partial"
_READ_BYTES = 4 << 20


class OutputExistsError(ValueError):
    """Raised if an output path is already occupied by something else."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager: yields a temporary path, then fsyncs it and renames it over `path`.

    If the body raises, an existing file at `path` stays unchanged.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.json"
        >>> with atomic_file(target) as partial:
        ...     _ = partial.write_text("{}")
        >>> target.read_text()
        '{}'
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        fsync_path(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def staged_files(folder: str | os.PathLike[str], *, last: str) -> Iterator[Path]:
    """Context manager: yields a temporary folder whose files then move into `folder` together.

    The file `last` is the one without which the folder cannot be loaded. Its old version is removed
    first, and the new one arrives after all others. A kill thus leaves the old folder, one that
    cannot be loaded, or the new one, but never a loadable mixture.

    Args:
        folder: Output folder; created if necessary. Other files in it are kept.
        last: Name of the file that makes the folder loadable; the body must write it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        names = sorted(path.name for path in stage.iterdir() if path.name != last)
        for name in (*names, last):
            fsync_path(stage / name)
        (folder / last).unlink(missing_ok=True)
        fsync_path(folder)
        for name in (*names, last):
            os.replace(stage / name, folder / name)
        fsync_path(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Fsyncs a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 digest of a file, as shown on the Hub's file pages."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(path: str | os.PathLike[str]) -> Iterator[memoryview]:
    """Yields the chunks of a file; each is valid only until the next one is read."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]


def take_lock(path: str | os.PathLike[str], *, shared: bool = False) -> int | None:
    """Locks a file, which is created if necessary, until the returned descriptor is closed.

    Args:
        path: Lock file.
        shared: Whether other shared locks may be held at the same time.

    Returns:
        The descriptor; None on systems without such locks.

    Raises:
        OutputExistsError: If another process holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OutputExistsError(
            f"{Path(path).parent}: another process is building this folder; wait for it"
        ) from error
    return descriptor


def file_identity(path: str | os.PathLike[str]) -> list[Any]:
    """Identifies the state of an input file without reading it: name, size, time."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]

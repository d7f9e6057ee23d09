"""Atomic writes, digests, safe file names and folder locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

StrPath: TypeAlias = str | os.PathLike[str]
"""A path in any form that `open` accepts."""

MAX_NAME_BYTES = 255
"""Maximum length of a file name on common file systems."""

_LOCK_PATIENCE_S = 3.0
"""Time to wait for a lock, in seconds; the workers of a killed run need this long to end."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of `flock` where a file system is mounted without locks, as Lustre is by default."""

_PARTIAL_SUFFIX = ".partial"
_STAGE = ".staged.partial"
_READ_BYTES = 4 << 20


class OutputExistsError(ValueError):
    """Raised if the output path already contains something else."""


class FolderInUseError(OutputExistsError):
    """Raised if another process is working on the folder."""


class UnsafeNameError(ValueError):
    """Raised if an id or path from data cannot safely be used as a file name."""


def check_name(name: object, *, room_bytes: int = 0) -> str:
    """Returns `name` unchanged if it can safely be used as a file name.

    Args:
        name: An id read from data.
        room_bytes: Number of bytes that the caller will append, for instance a suffix.

    Raises:
        UnsafeNameError: If it is not a string, is empty, `.` or `..`, is too long, or contains path
            separators, control characters or unpaired surrogates.

    Example:
        >>> check_name("TCGA-A1-A0SB-01Z")
        'TCGA-A1-A0SB-01Z'
        >>> check_name("../secret")
        Traceback (most recent call last):
        pathcore.files.UnsafeNameError: id '../secret': '/' is not allowed in a file name
    """
    if not isinstance(name, str):
        raise UnsafeNameError(f"id: expected text, found {type(name).__name__}")
    if not name or name != name.strip() or set(name) == {"."}:
        raise UnsafeNameError(f"id {name!r:.80}: cannot be a file name")
    bad = next((c for c in name if c in "/\\" or ord(c) < 32 or ord(c) == 127), None)
    if bad is not None:
        raise UnsafeNameError(f"id {name!r:.80}: {bad!r} is not allowed in a file name")
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise UnsafeNameError(f"id {name!r:.80}: contains an unpaired surrogate") from error
    if num_bytes + room_bytes > MAX_NAME_BYTES:
        raise UnsafeNameError(
            f"id {name!r:.40}...: {num_bytes} bytes long, expected at most "
            f"{MAX_NAME_BYTES - room_bytes}"
        )
    return name


def fsync_path(path: StrPath) -> None:
    """Flushes a file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: StrPath, *, partial_name: str | None = None) -> Iterator[Path]:
    """Yields a temporary path, then fsyncs it and renames it over `path`.

    If the body raises, the temporary file is deleted and an existing `path` is kept. Missing parent
    folders are created.

    Args:
        path: File to write.
        partial_name: Name of the temporary file. By default it contains the process id, so that
            concurrent writers never share one.

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
    # The name is hashed because `path.name` may already be as long as the file system allows.
    checksum = zlib.crc32(os.fsencode(path.name))
    partial = path.with_name(partial_name or f".{checksum:08x}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        yield partial
        fsync_path(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def staged_files(folder: StrPath, *, last: str) -> Iterator[Path]:
    """Yields a staging folder whose files are moved into `folder` together at the end.

    `last` is the file without which `folder` cannot be loaded. An existing file of that name is
    deleted first, and the new one is moved after all others. A kill therefore leaves the old
    folder, one that cannot be loaded, or the new one, but never a loadable mixture.

    Args:
        folder: Target folder; created if needed. Other files in it are kept.
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


def remove_partials(folder: StrPath) -> None:
    """Deletes the temporary files of killed writers, recursively; no writer may be running."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(_PARTIAL_SUFFIX):
                os.unlink(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                remove_partials(entry.path)


def write_text(path: StrPath, text: str) -> None:
    """Writes a UTF-8 text file atomically and without translating line ends."""
    with atomic_file(path) as partial:
        partial.write_bytes(text.encode())


def write_json(path: StrPath, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: StrPath, *, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        what: Description of the file, for error messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{what} {path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} {path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_chunks(path: StrPath) -> Iterator[memoryview]:
    """Yields the bytes of a file in chunks; each chunk is valid until the next is requested."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]


def sha256_of(path: StrPath) -> str:
    """Returns the SHA-256 digest of a file, or of the names and contents of a folder's files."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        for chunk in read_chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def file_identity(path: StrPath) -> list[Any]:
    """Returns path, size and modification time, to detect that an input file was replaced."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


@contextmanager
def folder_lock(
    lock_file: StrPath, *, folder: StrPath | None = None, shared: bool = False
) -> Iterator[None]:
    """Holds the lock of an output folder; the operating system releases it when the process dies.

    Args:
        lock_file: Lock file; created if needed and never deleted, since a process could then hold
            the deleted file while another one locks its successor.
        folder: Folder to name in the error message; by default the parent of `lock_file`.
        shared: Whether other shared locks may be held at the same time.

    Raises:
        FolderInUseError: If another process still holds the lock after 3 seconds.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(lock_file, os.O_CREAT | os.O_RDWR, 0o644)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise FolderInUseError(
                        f"{folder or Path(lock_file).parent}: another process is working on this "
                        "folder; wait for it to finish, or name another folder"
                    ) from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"{lock_file}: this file system has no locks ({error.strerror}); make sure "
                    "that no other process writes to the folder",
                    stacklevel=3,
                )
                break
        yield
    finally:
        os.close(descriptor)

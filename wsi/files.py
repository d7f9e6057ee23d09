"""Output that is whole or absent, names that stay in their folder, a lock on a folder."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

MAX_NAME_BYTES = 255
"""Longest file name that common file systems take."""

_LOCK_PATIENCE_S = 3.0
_PARTIAL_SUFFIX = ".partial"
_READ_BYTES = 4 << 20


class FolderInUseError(ValueError):
    """Another process is working on the folder."""


class UnsafeNameError(ValueError):
    """An id from data that is no plain file name."""


def check_name(name: object, *, room_bytes: int = 0) -> str:
    """Returns an id if it can be a file name by itself, inside one folder.

    Args:
        name: The id, as data gave it.
        room_bytes: Bytes that will be put around it, a suffix for instance.

    Raises:
        UnsafeNameError: Not text, empty, `.` or `..`, too long, or with characters that separate
            folders, control terminals or exist in no text.
    """
    if not isinstance(name, str):
        raise UnsafeNameError(f"id: text expected, got {type(name).__name__}")
    if not name or name != name.strip() or set(name) == {"."}:
        raise UnsafeNameError(f"id {name!r:.80}: cannot be a file name")
    bad = next((c for c in name if c in "/\\" or ord(c) < 32 or ord(c) == 127), None)
    if bad is not None:
        raise UnsafeNameError(f"id {name!r:.80}: {bad!r} cannot stand in a file name")
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise UnsafeNameError(f"id {name!r:.80}: holds half a surrogate pair") from error
    if num_bytes + room_bytes > MAX_NAME_BYTES:
        raise UnsafeNameError(
            f"id {name!r:.40}...: {num_bytes} bytes; at most {MAX_NAME_BYTES - room_bytes} fit"
        )
    return name


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; at the end the file is forced to disk and takes its place.

    If the body raises, nothing takes the place, and what was there stays. The path handed out
    belongs to this process, so that two writers never mix.
    """
    path = Path(path)
    # Of a length of its own: names may be as long as the file system takes.
    checksum = zlib.crc32(os.fsencode(path.name))
    partial = path.with_name(f".{checksum:08x}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        yield partial
        fsync_path(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def remove_partials(folder: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in a folder and those in it; no writer may be alive."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(_PARTIAL_SUFFIX):
                os.unlink(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                remove_partials(entry.path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file that is whole or absent; line ends are left as they are."""
    with atomic_file(path) as partial:
        partial.write_bytes(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file that is whole or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 digest of a file, or of the files of a folder with their names."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with open(file, "rb", buffering=0) as stream:
            buffer = bytearray(_READ_BYTES)
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@contextmanager
def folder_lock(lock_file: Path) -> Iterator[None]:
    """Holds a folder for one run; the system lets go of it when the process dies.

    Raises:
        FolderInUseError: Another run holds it, and still does after a moment: the workers of a run
            that was just killed need one to notice.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(lock_file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise FolderInUseError(
                        f"{lock_file.parent.parent}: another run is working on this folder; wait "
                        "for it, or name another folder"
                    ) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)

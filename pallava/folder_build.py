"""Builds folders of weights file by file; a folder gets its name once every file is verified.

A folder is built in `NAME.partial`, where a later run resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xxhash

from pathcore.files import (
    OutputExistsError,
    StrPath,
    atomic_file,
    file_identity,
    folder_lock,
    fsync_path,
    read_chunks,
    write_text,
)
from pathcore.rows import read_lines

MANIFEST_NAME = "release.manifest.jsonl"
"""Manifest of a built folder: its inputs, then one row per file with digest and checksum."""

_ROW_KEYS = {"file", "bytes", "sha256", "xxh3_128"}
_LOCK = ".lock"

_LARGE_BYTES = 16 << 20
"""Files from this size are read back while the next one is written, smaller ones at the end."""


def checksum_of(path: StrPath) -> str:
    """Returns the 128-bit XXH3 checksum of a file; ten times faster than SHA-256."""
    checksum = xxhash.xxh3_128()
    for chunk in read_chunks(path):
        checksum.update(chunk)
    return checksum.hexdigest()


class FileDigest:
    """Digest and checksum of a file, computed while it is written.

    The SHA-256 digest is published for others to verify. The XXH3 checksum is used to read the file
    back immediately, which only needs to detect disk errors.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._checksum = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Appends bytes of the file."""
        self._sha256.update(data)
        self._checksum.update(data)

    def row(self) -> dict[str, str]:
        """Returns digest and checksum by name, as lowercase hexadecimal strings."""
        return {"sha256": self._sha256.hexdigest(), "xxh3_128": self._checksum.hexdigest()}


class FolderBuild:
    """A folder that is built file by file, resumable, and verified at the end.

    Files are written to `OUT.partial`. Each complete file is recorded with its digest, so that a
    later build from the same inputs continues after it. Every file is read back, large ones while
    the next is being written; `finish` compares checksums and then renames the folder. Several
    threads may each write a file.

    Args:
        out: Folder to build.
        inputs: JSON values that the content depends on; a build from other inputs starts over.

    Raises:
        OutputExistsError: If `out` holds something else, or another process is building it.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "model"
        >>> with FolderBuild(out, {"version": 1}) as build:
        ...     with build.file("config.json") as path:
        ...         _ = path.write_text("{}")
        ...     _ = build.finish()
        >>> sorted(path.name for path in out.iterdir())
        ['config.json', 'release.manifest.jsonl']
    """

    def __init__(self, out: StrPath, inputs: Mapping[str, Any]) -> None:
        # If `out` is a symbolic link, its target is written, whether or not it exists.
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.inputs = json.loads(json.dumps(inputs))
        self._rows: dict[str, dict[str, Any]] = {}
        self._readers = ThreadPoolExecutor(2)
        self._read_back: dict[str, tuple[list[Any], Future[str]]] = {}
        self._stack = ExitStack()
        self.complete = False

    def __enter__(self) -> FolderBuild:
        if self.out.is_dir() and any(self.out.iterdir()):
            self._check_finished()
            return self
        if self.out.exists() and not self.out.is_dir():
            raise OutputExistsError(f"{self.out}: is a file; name a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(folder_lock(self.folder / _LOCK, folder=self.out))
        inputs, rows = read_manifest(self.folder)
        if inputs == self.inputs:
            self._rows = {name: row for name, row in rows.items() if self._is_there(row)}
        else:
            self._clear()
        self._write_manifest()
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._stack.close()

    def has(self, name: str) -> bool:
        """Returns whether an earlier run has already written a file."""
        return name in self._rows

    @contextmanager
    def file(self, name: str, digest: FileDigest | None = None) -> Iterator[Path]:
        """Yields the path of one file and records the file on exit.

        Args:
            name: File name inside the folder; `/` creates sub-folders.
            digest: Digest that the caller updates with the written bytes; without one, the file is
                read on exit.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            yield partial
        num_bytes = path.stat().st_size
        if digest is None:
            digest = FileDigest()
            for chunk in read_chunks(path):
                digest.update(chunk)
        row = {"file": name, "bytes": num_bytes, **digest.row()}
        self._rows[name] = row
        with open(self.folder / MANIFEST_NAME, "a", encoding="utf-8") as manifest:
            manifest.write(json.dumps(row) + "\n")
            manifest.flush()
            os.fsync(manifest.fileno())
        if num_bytes >= _LARGE_BYTES:
            self._start_reading(name, path)

    def finish(self) -> dict[str, str]:
        """Verifies every file and renames the folder to its final name.

        Returns:
            SHA-256 digest by file name.

        Raises:
            OSError: If a file reads back differently from what was written.
        """
        if not self.complete:
            self._verify(self.folder)
            self._drop_strays()
            self._write_manifest()
            if self.out.is_dir():
                self.out.rmdir()
            # Removed before renaming, or a kill in between would leave it in the finished folder.
            (self.folder / _LOCK).unlink(missing_ok=True)
            os.replace(self.folder, self.out)
            fsync_path(self.out.parent)
            self.complete = True
        return {name: str(row["sha256"]) for name, row in self._rows.items()}

    def _check_finished(self) -> None:
        inputs, rows = read_manifest(self.out)
        if inputs != self.inputs:
            raise OutputExistsError(
                f"{self.out}: already exists and holds the result of other inputs; "
                "name a new folder, or remove it"
            )
        self._rows, self.complete = rows, True
        self._verify(self.out)

    def _start_reading(self, name: str, path: Path) -> None:
        """Reads a file back in the background, unless it was read since its last change."""
        identity = file_identity(path) if path.is_file() else []
        known = self._read_back.get(name)
        if identity and (known is None or known[0] != identity):
            self._read_back[name] = identity, self._readers.submit(checksum_of, path)

    def _verify(self, folder: Path) -> None:
        for name in self._rows:
            self._start_reading(name, folder / name)
        for name, row in self._rows.items():
            path = folder / name
            checksum = self._read_back[name][1].result() if path.is_file() else ""
            if checksum != row["xxh3_128"]:
                raise OSError(
                    f"{path}: reads back differently from what was written; check the disk, remove "
                    f"{folder} and run again"
                )

    def _is_there(self, row: Mapping[str, Any]) -> bool:
        path = self.folder / str(row["file"])
        return path.is_file() and path.stat().st_size == row["bytes"]

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name == _LOCK:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _drop_strays(self) -> None:
        """Removes incomplete files of killed runs, so that reruns produce the same folder."""
        keep = {self.folder / name for name in (*self._rows, MANIFEST_NAME, _LOCK)}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in keep:
                path.unlink()

    def _write_manifest(self) -> None:
        rows = [self._rows[name] for name in sorted(self._rows)]
        lines = [json.dumps({"inputs": self.inputs}), *map(json.dumps, rows)]
        write_text(self.folder / MANIFEST_NAME, "\n".join(lines) + "\n")


def read_manifest(
    folder: StrPath,
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Reads the inputs and the file rows of a built folder; `(None, {})` without a manifest.

    A last line that was truncated by a kill is ignored.
    """
    file = Path(folder) / MANIFEST_NAME
    if not file.is_file():
        return None, {}
    inputs: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any]] = {}
    for _, row in read_lines(file):
        if isinstance(row, dict) and "inputs" in row:
            inputs = row["inputs"]
        elif isinstance(row, dict) and set(row) >= _ROW_KEYS:
            rows[str(row["file"])] = row
    return inputs, rows

"""Digests of image files by content, so that a changed image is told from the one answered before.

Names and sizes do not tell images apart: uncompressed BMP and TIFF files of one data set all have
the same size, and stain-normalised copies keep the names.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import xxhash

from pallava.files import read_chunks, write_json

_CLOCK_S = 2.0
"""Coarsest clock of common file systems (FAT); ext4 and XFS tick every few milliseconds."""


class ImageDigests:
    """Content digests of files, kept in a JSON file while the files stay as they are.

    A kept digest counts while path, size, modification time, change time and inode are the same.
    The modification time alone would not do: files unpacked from one archive often share it, and
    `mv` and `cp -p` carry it along.

    Args:
        path: The JSON file, written by `save`; None keeps digests in memory only.

    Example:
        >>> import tempfile
        >>> image = Path(tempfile.mkdtemp()) / "a.bmp"
        >>> _ = image.write_bytes(b"pixels")
        >>> ImageDigests()(image)
        '99a312fa56352d6171ae996185fe9ceb'
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._kept: dict[str, list[Any]] = {}
        if self.path is not None and self.path.is_file():
            try:
                kept = json.loads(self.path.read_bytes())
            except ValueError:
                kept = None  # only a cache: the files are read again
            if isinstance(kept, dict):
                self._kept = kept
        self.durable = dict(self._kept)
        """What `save` writes: path -> size, modification and change time, inode, digest."""

    def __call__(self, path: Path) -> str:
        """Returns the digest of a file's content.

        Raises:
            OSError: If the file cannot be read.
        """
        key, state = os.path.abspath(path), _state(path)
        kept = self._kept.get(key)
        if isinstance(kept, list) and kept[:-1] == state and isinstance(kept[-1], str):
            return kept[-1]
        digest = content_digest(path)
        self._kept[key] = [*state, digest]
        # A file changed twice within one tick of the clock shows the same times for both contents
        # (git calls such entries racy), so only digests of files at rest are written to disk.
        if max(state[1], state[2]) < (time.time() - _CLOCK_S) * 1e9:
            self.durable[key] = self._kept[key]
        else:
            self.durable.pop(key, None)
        return digest

    def save(self) -> None:
        """Writes the digests if there is a file for them."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.durable)


def content_digest(path: Path) -> str:
    """Returns the 128-bit XXH3 digest of a file: as fast as the disk, unlike SHA-256."""
    digest = xxhash.xxh3_128()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

"""Content digests of image files, which detect images that changed since they were answered.

Names and sizes cannot detect this: uncompressed BMP and TIFF files of one dataset all have the same
size, and stain-normalised copies keep their names.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import xxhash

from pathcore.files import StrPath, read_chunks, write_json

_CLOCK_S = 2.0
"""Coarsest timestamp resolution of common file systems (FAT); ext4 and XFS have milliseconds."""


class ImageDigests:
    """Content digests of files, cached in a JSON file while the files stay unchanged.

    A cached digest is valid while path, size, modification time, change time and inode stay the
    same. The modification time alone is not enough: files unpacked from one archive often share it,
    and `mv` and `cp -p` preserve it.

    Args:
        path: JSON file written by `save`; None keeps digests in memory only.

    Example:
        >>> import tempfile
        >>> image = Path(tempfile.mkdtemp()) / "a.bmp"
        >>> _ = image.write_bytes(b"pixels")
        >>> ImageDigests()(image)
        '99a312fa56352d6171ae996185fe9ceb'
    """

    def __init__(self, path: StrPath | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._kept: dict[str, list[Any]] = {}
        if self.path is not None and self.path.is_file():
            try:
                kept = json.loads(self.path.read_bytes())
            except ValueError:
                kept = None  # a damaged cache is ignored
            if isinstance(kept, dict):
                self._kept = kept
        self.durable = dict(self._kept)
        """Content of `save`: path -> size, modification time, change time, inode, digest."""

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
        # Two changes within one clock tick leave the same timestamps (git calls such entries racy),
        # so only digests of files that have not changed recently are written to disk.
        if max(state[1], state[2]) < (time.time() - _CLOCK_S) * 1e9:
            self.durable[key] = self._kept[key]
        else:
            self.durable.pop(key, None)
        return digest

    def save(self) -> None:
        """Writes the digests to disk if there is a path for them."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.durable)


def content_digest(path: Path) -> str:
    """Returns the 128-bit XXH3 digest of a file; unlike SHA-256, it is as fast as the disk."""
    digest = xxhash.xxh3_128()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

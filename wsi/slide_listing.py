"""The slides in a folder, by id: a name from data is looked up here and never becomes a path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from wsi.openers import PLAIN_SUFFIXES, SLIDE_SUFFIXES


class SlideListing:
    """Slides under a folder; the id of a slide is its file name without suffix.

    Sub-folders count: the GDC's transfer tool puts every slide into one of its own.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: No such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))
        if not self.folder.is_dir():
            raise FileNotFoundError(f"slides {folder}: no such folder")
        self._paths: dict[str, list[Path]] = {}
        for root, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                path = Path(root, name)
                if path.suffix.lower() in (*SLIDE_SUFFIXES, *PLAIN_SUFFIXES):
                    self._paths.setdefault(path.stem, []).append(path)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def ids(self) -> list[str]:
        """The ids, sorted."""
        return sorted(self._paths)

    def find(self, slide_ids: Iterable[str]) -> dict[str, Path | str]:
        """Looks ids up.

        Returns:
            By id the slide's file, or why there is none.
        """
        return {slide_id: self._find(slide_id) for slide_id in slide_ids}

    def _find(self, slide_id: str) -> Path | str:
        paths = self._paths.get(slide_id, [])
        if len(paths) == 1:
            return paths[0]
        if not paths:
            return f"no slide of this name under {self.folder}"
        return f"{len(paths)} slides have this name: {', '.join(map(str, paths[:3]))}"

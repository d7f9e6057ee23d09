"""Requests for patches, read from coordinate files and sorted by slide in a table on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from pathcore.files import StrPath, UnsafeNameError, check_name, fsync_path
from wsi.store import read_coordinates

NAME_ROOM_BYTES = len("_-2147483648_-2147483648.webp")
"""Maximum number of bytes that file names of patches add to the id of their slide."""

_BATCH = 1000  # rows per transaction
_CACHE_KIB = 8192  # of SQLite's pages


@dataclass(frozen=True)
class PatchRequest:
    """A patch to extract.

    Attributes:
        number: Number of the row that requests it, counted from 1.
        slide_id: Id of the slide; the reader of the rows has checked that it is a plain file name.
        x_level0: Left edge in level-0 pixels.
        y_level0: Top edge in level-0 pixels.
        size_level0: Side in level-0 pixels.
        size_px: Side of the resulting image in pixels.
        caption: Caption, or None.
        slide_px: Width and height of the slide at level 0; None if the source does not state them.
    """

    number: int
    slide_id: str
    x_level0: int
    y_level0: int
    size_level0: int
    size_px: int
    caption: str | None = None
    slide_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not a valid request.

    Attributes:
        number: Number of the row, counted from 1.
        reason: Category of the fault, in a few words.
        detail: What was found.
    """

    number: int
    reason: str
    detail: str


@dataclass(frozen=True)
class MissingSlide:
    """A requested slide that does not exist or is ambiguous.

    Attributes:
        slide_id: Id of the slide.
        reason: Category of the fault, in a few words.
        detail: What was found instead.
        rows: Numbers of the rows that request patches of it.
    """

    slide_id: str
    reason: str
    detail: str
    rows: list[int]


def read_coordinate_folder(folder: StrPath) -> Iterator[PatchRequest | RejectedRow]:
    """Reads the coordinate files of a folder, written by this package, TRIDENT or CLAM.

    Args:
        folder: Folder with one `.h5` file per slide.

    Yields:
        A request per coordinate. A file that cannot be used counts as one rejected row.

    Raises:
        FileNotFoundError: If the folder does not exist or has no `.h5` files.
    """
    paths = sorted(p for p in Path(folder).glob("*.h5") if not p.name.startswith("."))
    if not paths:
        inside = Path(folder) / "coords"  # of the output of `tile`
        hint = f"; did you mean {inside}?" if any(inside.glob("*.h5")) else ""
        raise FileNotFoundError(f"coordinates {folder}: no folder with .h5 files{hint}")
    number = 0
    for path in paths:
        try:
            found = read_coordinates(path)
            slide_id = check_name(found.name, room_bytes=NAME_ROOM_BYTES)
        except (ValueError, UnsafeNameError) as error:
            number += 1
            yield RejectedRow(number, "bad coordinates file", str(error))
            continue
        for x, y in found.coords.tolist():
            number += 1
            size, patch_px, slide_px = found.size_level0, found.patch_px, found.slide_px
            yield PatchRequest(number, slide_id, x, y, size, patch_px, slide_px=slide_px)


class RequestTable:
    """SQLite table of the requests of a job, sorted by slide and then from top to bottom.

    Memory does not grow with the number of rows. For missing slides only positions are stored. They
    reserve the numbers of their requests, so that the job writes the same files whether a slide was
    present from the beginning or added later.

    Args:
        path: The table, written by `build`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def __enter__(self) -> RequestTable:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    @property
    def num_positions(self) -> int:
        """Number of requests, including those for missing slides."""
        query = "SELECT coalesce(max(position), 0) FROM ordering"
        return int(self._connection.execute(query).fetchone()[0])

    def __len__(self) -> int:
        """Returns the number of requests whose slide exists."""
        return sum(last - first + 1 for first, last in self._ranges("reason IS NULL"))

    def part(self, number: int, size: int) -> list[PatchRequest]:
        """Returns the requests of a part of `size` positions whose slides exist."""
        # Tables of version 0.1.0 do not have the size of the slide.
        has_size = self._has("requests", "slide_width")
        slide_px = "slide_width, slide_height" if has_size else "NULL, NULL"
        rows = self._connection.execute(
            "SELECT number, slide_id, x_level0, y_level0, size_level0, size_px, caption,"
            f" {slide_px} FROM ordering JOIN requests USING (number) JOIN slides USING (slide)"
            " WHERE position > ? AND position <= ? AND reason IS NULL ORDER BY position",
            (number * size, (number + 1) * size),
        )
        return [
            PatchRequest(*asked, slide_px=(width, height) if width else None)  # type: ignore[misc]
            for *asked, width, height in rows
        ]

    def parts_with_requests(self, size: int) -> list[int]:
        """Returns the numbers of the parts for which `part` returns requests."""
        return _parts_of(self._ranges("reason IS NULL"), size)

    def rejected(self) -> Iterator[RejectedRow]:
        """Yields the rejected rows, sorted by number."""
        query = "SELECT number, reason, detail FROM rejected ORDER BY number"
        yield from (RejectedRow(*row) for row in self._connection.execute(query))

    def missing(self) -> Iterator[MissingSlide]:
        """Yields the missing slides, sorted by id."""
        rows = self._connection.execute(
            "SELECT slide_id, reason, detail, number FROM slides JOIN requests USING (slide)"
            " JOIN ordering USING (number) WHERE reason IS NOT NULL ORDER BY slide_id, number"
        )
        for (slide_id, reason, detail), group in groupby(rows, key=lambda row: row[:3]):
            yield MissingSlide(slide_id, reason, detail, [row[3] for row in group])

    def parts_of(self, slide_ids: Collection[str], size: int) -> list[int]:
        """Returns the numbers of the parts with positions on these slides, missing or not."""
        marks = ", ".join("?" * len(slide_ids))
        return _parts_of(self._ranges(f"slide_id IN ({marks})", tuple(slide_ids)), size)

    def add_slides(
        self, slide_ids: Collection[str], rows: Iterable[PatchRequest | RejectedRow]
    ) -> None:
        """Adds slides that were missing when the table was built.

        Args:
            slide_ids: The slides.
            rows: The rows that the table was built from; captions of missing slides are not stored,
                so they are read again.
        """
        wanted = set(slide_ids)
        captions = (
            (row.caption, row.number)
            for row in rows
            if isinstance(row, PatchRequest) and row.slide_id in wanted
        )
        found = ((slide_id,) for slide_id in wanted)
        connection = sqlite3.connect(self._path)
        try:
            with connection:  # a single transaction, so a killed run does not change the table
                connection.executemany("UPDATE requests SET caption = ? WHERE number = ?", captions)
                connection.executemany(
                    "UPDATE slides SET reason = NULL, detail = NULL WHERE slide_id = ?", found
                )
        finally:
            connection.close()

    @staticmethod
    def build(
        path: Path,
        rows: Iterable[PatchRequest | RejectedRow],
        why_missing: Callable[[str], tuple[str, str] | None] = lambda slide_id: None,
    ) -> None:
        """Writes a table atomically. A second request for the same position is rejected.

        Args:
            path: The table.
            rows: The requests, in the order of their source.
            why_missing: Function that returns reason and detail for the id of a missing slide, and
                None for others; by default no slide is missing.
        """
        # Without journal and synchronous writes, because a crash discards the partial file anyway.
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        try:
            connection.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                f"PRAGMA temp_store = FILE; PRAGMA cache_size = -{_CACHE_KIB};"
                "CREATE TABLE slides (slide INTEGER PRIMARY KEY, slide_id TEXT NOT NULL UNIQUE,"
                " reason TEXT, detail TEXT, first_position INTEGER, last_position INTEGER);"
                "CREATE TABLE requests (number INTEGER PRIMARY KEY, slide INTEGER NOT NULL,"
                " x_level0 INTEGER, y_level0 INTEGER, size_level0 INTEGER, size_px INTEGER,"
                " caption TEXT, slide_width INTEGER, slide_height INTEGER);"
                "CREATE TABLE rejected (number INTEGER PRIMARY KEY, reason TEXT, detail TEXT);"
                "CREATE TABLE ordering (position INTEGER PRIMARY KEY, number INTEGER NOT NULL);"
            )
            _insert(connection, rows, why_missing)
            _order(connection)
            connection.commit()
        finally:
            connection.close()
        fsync_path(partial)
        partial.replace(path)
        fsync_path(path.parent)

    def _ranges(self, where: str, values: tuple[str, ...] = ()) -> list[tuple[int, int]]:
        """Returns first and last position of the slides that fulfil a condition."""
        if self._has("slides", "last_position"):
            query = f"SELECT first_position, last_position FROM slides WHERE {where}"
            ranges = self._connection.execute(query, values).fetchall()
            return [(first, last) for first, last in ranges if first is not None]
        # Tables of version 0.1.0; this reads every request.
        query = (
            "SELECT min(position), max(position) FROM ordering JOIN requests USING (number)"
            f" JOIN slides USING (slide) WHERE {where} GROUP BY slide"
        )
        return self._connection.execute(query, values).fetchall()

    def _has(self, table: str, column: str) -> bool:
        columns = self._connection.execute(f"PRAGMA table_info({table})")
        return column in {row[1] for row in columns}


def _insert(
    connection: sqlite3.Connection,
    rows: Iterable[PatchRequest | RejectedRow],
    why_missing: Callable[[str], tuple[str, str] | None],
) -> None:
    numbers: dict[str, int] = {}
    missing: set[int] = set()
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        requests: list[tuple[Any, ...]] = []
        rejected: list[tuple[int, str, str]] = []
        for row in batch:
            if isinstance(row, RejectedRow):
                detail = row.detail.encode(errors="backslashreplace").decode()
                rejected.append((row.number, row.reason, detail))
                continue
            slide = numbers.get(row.slide_id)
            if slide is None:
                slide = numbers[row.slide_id] = len(numbers)
                reason = why_missing(row.slide_id)
                connection.execute(
                    "INSERT INTO slides (slide, slide_id, reason, detail) VALUES (?, ?, ?, ?)",
                    (slide, row.slide_id, *(reason or (None, None))),
                )
                if reason:
                    missing.add(slide)
            caption = None if slide in missing else row.caption
            place = (row.x_level0, row.y_level0, row.size_level0, row.size_px)
            slide_px = row.slide_px or (None, None)
            requests.append((row.number, slide, *place, caption, *slide_px))
        connection.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", requests)
        connection.executemany("INSERT INTO rejected VALUES (?, ?, ?)", rejected)


def _order(connection: sqlite3.Connection) -> None:
    # Captions are not part of the sort, to keep it small; SQLite spills it to disk.
    rows = connection.execute(
        "SELECT number, slide, x_level0, y_level0 FROM requests JOIN slides USING (slide)"
        " ORDER BY slide_id, y_level0, x_level0, number"
    )
    writer = connection.cursor()
    ranges: dict[int, tuple[int, int]] = {}

    def ordering() -> Iterator[tuple[int, int]]:
        previous: tuple[Any, ...] = ()
        first_number = position = 0
        for number, *place in rows:
            if tuple(place) == previous:
                detail = f"row {first_number} asked for this position of this slide already"
                writer.execute("INSERT INTO rejected VALUES (?, 'duplicate', ?)", (number, detail))
                continue
            position += 1
            previous, first_number = tuple(place), number
            slide = place[0]
            ranges[slide] = (ranges.get(slide, (position, 0))[0], position)
            yield position, number

    connection.executemany("INSERT INTO ordering VALUES (?, ?)", ordering())
    connection.executemany(
        "UPDATE slides SET first_position = ?, last_position = ? WHERE slide = ?",
        ((*ends, slide) for slide, ends in ranges.items()),
    )


def _parts_of(ranges: Iterable[tuple[int, int]], size: int) -> list[int]:
    """Returns the numbers of the parts of `size` positions that ranges of positions touch."""
    touched = (range((first - 1) // size, (last - 1) // size + 1) for first, last in ranges)
    return sorted({number for numbers in touched for number in numbers})

"""Requests for patches: read from coordinate files, and sorted by slide in a table on disk."""

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
"""Bytes that the names of patch files add to the id of their slide."""

_BATCH = 1000
_CACHE_KIB = 8192


@dataclass(frozen=True)
class PatchRequest:
    """One patch to extract.

    Attributes:
        number: Number of the row that asks for it, counted from 1.
        slide_id: Id of the slide, a plain file name; whoever reads the rows has checked it.
        x_level0: Left edge in level-0 pixels.
        y_level0: Top edge in level-0 pixels.
        size_level0: Side in level-0 pixels.
        size_px: Side of the image that comes out.
        caption: Its caption, if it has one.
    """

    number: int
    slide_id: str
    x_level0: int
    y_level0: int
    size_level0: int
    size_px: int
    caption: str | None = None


@dataclass(frozen=True)
class RejectedRow:
    """A row that does not ask for a patch that could be extracted.

    Attributes:
        number: Number of the row, counted from 1.
        reason: A few words, the same for all rows with this fault.
        detail: What was found.
    """

    number: int
    reason: str
    detail: str


@dataclass(frozen=True)
class MissingSlide:
    """A slide that rows ask for and that is not there.

    Attributes:
        slide_id: Its id.
        reason: A few words, the same for all slides with this fault.
        detail: What was found instead.
        rows: Numbers of the rows that ask for it.
    """

    slide_id: str
    reason: str
    detail: str
    rows: list[int]


def read_coordinate_folder(folder: StrPath) -> Iterator[PatchRequest | RejectedRow]:
    """Reads the coordinate files of a folder, written by this package, TRIDENT or CLAM.

    Args:
        folder: Holds one `.h5` file per slide.

    Yields:
        A request per coordinate. A file that cannot be used counts as one rejected row.

    Raises:
        FileNotFoundError: If there is no such folder, or no `.h5` file in it.
    """
    paths = sorted(p for p in Path(folder).glob("*.h5") if not p.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"coordinates {folder}: no folder with .h5 files")
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
            yield PatchRequest(number, slide_id, x, y, found.size_level0, found.patch_px)


class RequestTable:
    """The requests of a job, ordered by slide and then from top to bottom, in an SQLite file.

    Memory does not grow with the number of rows. For a slide that is not there only positions are
    stored: they keep the place of its requests in the order, so that the job writes the same files
    whether the slide was there from the beginning or arrived later.

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
        """Number of requests in the order, those for missing slides included."""
        return self._count("SELECT coalesce(max(position), 0) FROM ordering")

    def __len__(self) -> int:
        """Number of requests whose slide is there."""
        return self._count(
            "SELECT count(*) FROM ordering JOIN requests USING (number) JOIN slides USING (slide)"
            " WHERE reason IS NULL"
        )

    def part(self, number: int, size: int) -> list[PatchRequest]:
        """Returns the requests of the positions from `number * size` on whose slides are there."""
        rows = self._connection.execute(
            "SELECT number, slide_id, x_level0, y_level0, size_level0, size_px, caption"
            " FROM ordering JOIN requests USING (number) JOIN slides USING (slide)"
            " WHERE position > ? AND position <= ? AND reason IS NULL ORDER BY position",
            (number * size, (number + 1) * size),
        )
        return [PatchRequest(*row) for row in rows]

    def parts_with_requests(self, size: int) -> list[int]:
        """Returns the numbers of the parts that `part` has requests for."""
        rows = self._connection.execute(
            "SELECT DISTINCT (position - 1) / ? FROM ordering JOIN requests USING (number)"
            " JOIN slides USING (slide) WHERE reason IS NULL ORDER BY 1",
            (size,),
        )
        return [number for (number,) in rows]

    def rejected(self) -> Iterator[RejectedRow]:
        """Yields the rows that ask for no patch, in their order."""
        query = "SELECT number, reason, detail FROM rejected ORDER BY number"
        yield from (RejectedRow(*row) for row in self._connection.execute(query))

    def missing(self) -> Iterator[MissingSlide]:
        """Yields the slides that are not there, sorted by id."""
        rows = self._connection.execute(
            "SELECT slide_id, reason, detail, number FROM slides JOIN requests USING (slide)"
            " JOIN ordering USING (number) WHERE reason IS NOT NULL ORDER BY slide_id, number"
        )
        for (slide_id, reason, detail), group in groupby(rows, key=lambda row: row[:3]):
            yield MissingSlide(slide_id, reason, detail, [row[3] for row in group])

    def parts_of(self, slide_ids: Collection[str], size: int) -> list[int]:
        """Returns the numbers of the parts that contain positions on slides, missing or not."""
        marks = ", ".join("?" * len(slide_ids))
        rows = self._connection.execute(
            "SELECT DISTINCT (position - 1) / ? FROM ordering JOIN requests USING (number)"
            f" JOIN slides USING (slide) WHERE slide_id IN ({marks}) ORDER BY 1",
            (size, *slide_ids),
        )
        return [number for (number,) in rows]

    def add_slides(
        self, slide_ids: Collection[str], rows: Iterable[PatchRequest | RejectedRow]
    ) -> None:
        """Marks slides as there that were missing when the table was built.

        Args:
            slide_ids: The slides.
            rows: The rows that the table was built from; their captions are read again.
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
            with connection:  # one transaction: a killed run leaves the table as it was
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
        """Writes a table, whole or not at all; a second request for a position is rejected.

        Args:
            path: The table.
            rows: The requests, in the order of their source.
            why_missing: Returns reason and detail for the id of a slide that is not there; by
                default all are there.
        """
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        try:
            connection.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                f"PRAGMA temp_store = FILE; PRAGMA cache_size = -{_CACHE_KIB};"
                "CREATE TABLE slides (slide INTEGER PRIMARY KEY, slide_id TEXT NOT NULL UNIQUE,"
                " reason TEXT, detail TEXT);"
                "CREATE TABLE requests (number INTEGER PRIMARY KEY, slide INTEGER NOT NULL,"
                " x_level0 INTEGER, y_level0 INTEGER, size_level0 INTEGER, size_px INTEGER,"
                " caption TEXT);"
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

    def _count(self, query: str) -> int:
        return int(self._connection.execute(query).fetchone()[0])


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
                    "INSERT INTO slides VALUES (?, ?, ?, ?)",
                    (slide, row.slide_id, *(reason or (None, None))),
                )
                if reason:
                    missing.add(slide)
            caption = None if slide in missing else row.caption
            place = (row.x_level0, row.y_level0, row.size_level0, row.size_px)
            requests.append((row.number, slide, *place, caption))
        connection.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", requests)
        connection.executemany("INSERT INTO rejected VALUES (?, ?, ?)", rejected)


def _order(connection: sqlite3.Connection) -> None:
    # The sort carries positions, not captions; SQLite spills it to disk.
    rows = connection.execute(
        "SELECT number, slide_id, x_level0, y_level0 FROM requests JOIN slides USING (slide)"
        " ORDER BY slide_id, y_level0, x_level0, number"
    )
    writer = connection.cursor()
    previous: tuple[Any, ...] = ()
    first_number = position = 0
    for number, *place in rows:
        if tuple(place) == previous:
            detail = f"row {first_number} asked for this position of this slide already"
            writer.execute("INSERT INTO rejected VALUES (?, 'duplicate', ?)", (number, detail))
            continue
        position += 1
        previous, first_number = tuple(place), number
        writer.execute("INSERT INTO ordering VALUES (?, ?)", (position, number))

"""Millions of patches to extract, sorted by slide and position in a table on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pathcore.files import fsync_path

_BATCH = 1000
_CACHE_KIB = 8192
_COLUMNS = "number, slide_id, x_level0, y_level0, size_level0, size_px, caption"


@dataclass(frozen=True)
class PatchRequest:
    """One patch to extract.

    Attributes:
        number: Of the row it came from, counted from 1.
        slide_id: Id of the slide; a plain file name, which the reader of the rows has checked.
        x_level0: Left edge in level-0 pixels.
        y_level0: Top edge.
        size_level0: Side in level-0 pixels.
        size_px: Side of the image that comes out.
        caption: Its text; None where there is none.
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
    """A row that asks for no patch that could be extracted.

    Attributes:
        number: Of the row, counted from 1.
        reason: A few words, the same for all rows with this fault.
        detail: What was found.
    """

    number: int
    reason: str
    detail: str


class RequestTable:
    """The requests of a job in their order: by slide, then from top to bottom.

    Memory does not grow with the number of rows.

    Args:
        path: The table, written by `build`.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def __enter__(self) -> RequestTable:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def __len__(self) -> int:
        query = "SELECT coalesce(max(position), 0) FROM ordering"
        return int(self._connection.execute(query).fetchone()[0])

    def part(self, number: int, size: int) -> list[PatchRequest]:
        """The requests `number * size` to `(number + 1) * size` of the order."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM ordering JOIN requests USING (number) "
            "WHERE position > ? AND position <= ? ORDER BY position",
            (number * size, (number + 1) * size),
        )
        return [PatchRequest(*row) for row in rows]

    def rejected(self) -> Iterator[RejectedRow]:
        """The rows that ask for no patch, in their order."""
        query = "SELECT number, reason, detail FROM rejected ORDER BY number"
        yield from (RejectedRow(*row) for row in self._connection.execute(query))

    @staticmethod
    def build(path: Path, rows: Iterable[PatchRequest | RejectedRow]) -> None:
        """Writes a table, whole or not at all; a second request for a position is rejected.

        Args:
            path: The table.
            rows: In the order of the input.
        """
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        try:
            connection.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                f"PRAGMA temp_store = FILE; PRAGMA cache_size = -{_CACHE_KIB};"
                "CREATE TABLE requests (number INTEGER PRIMARY KEY, slide_id TEXT NOT NULL,"
                " x_level0 INTEGER, y_level0 INTEGER, size_level0 INTEGER, size_px INTEGER,"
                " caption TEXT);"
                "CREATE TABLE rejected (number INTEGER PRIMARY KEY, reason TEXT, detail TEXT);"
                "CREATE TABLE ordering (position INTEGER PRIMARY KEY, number INTEGER NOT NULL);"
            )
            _insert(connection, rows)
            _order(connection)
            connection.commit()
        finally:
            connection.close()
        fsync_path(partial)
        partial.replace(path)
        fsync_path(path.parent)


def _insert(connection: sqlite3.Connection, rows: Iterable[PatchRequest | RejectedRow]) -> None:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        requests = [_values(row) for row in batch if isinstance(row, PatchRequest)]
        rejected = [_printable(row) for row in batch if isinstance(row, RejectedRow)]
        connection.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", requests)
        connection.executemany("INSERT INTO rejected VALUES (?, ?, ?)", rejected)


def _order(connection: sqlite3.Connection) -> None:
    # The sort carries positions, not captions; SQLite spills it to disk.
    rows = connection.execute(
        "SELECT number, slide_id, x_level0, y_level0 FROM requests"
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


def _values(row: PatchRequest) -> tuple[Any, ...]:
    return (
        *(row.number, row.slide_id, row.x_level0, row.y_level0),
        *(row.size_level0, row.size_px, row.caption),
    )


def _printable(row: RejectedRow) -> tuple[int, str, str]:
    return row.number, row.reason, row.detail.encode(errors="backslashreplace").decode()

"""Every reply that was paid for, in an SQLite file: what resuming reads."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from pathgen.agents.budget import Spent

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    digest TEXT PRIMARY KEY, reply TEXT, problem TEXT, endpoint TEXT NOT NULL,
    cost REAL NOT NULL, tokens INTEGER NOT NULL)"""
_KEEP = """INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET
    reply = excluded.reply, problem = excluded.problem, endpoint = excluded.endpoint,
    cost = cost + excluded.cost, tokens = tokens + excluded.tokens"""
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Kept:
    """A usable reply and who gave it."""

    text: str
    endpoint: str


class ReplyCache:
    """Replies by the digest of what was asked. Failures are kept for their cost alone.

    Args:
        path: The file; made if need be. A killed process loses nothing that was kept.

    Raises:
        ValueError: The file is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=_PATIENCE_S)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(_TABLE)
            self._connection.commit()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: no cache of replies: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def get(self, digest: str) -> Kept | None:
        """The usable reply to what has this digest."""
        row = self._connection.execute(
            "SELECT reply, endpoint FROM replies WHERE digest = ? AND problem IS NULL", (digest,)
        ).fetchone()
        return Kept(*row) if row else None

    def keep(
        self, digest: str, reply: str, problem: str | None, endpoint: str, spent: Spent
    ) -> None:
        """Keeps a reply, or with a `problem` what was spent in vain.

        Raises:
            OSError: The file cannot be written, the disk is full for instance.
        """
        # SQLite stores UTF-8: half a surrogate pair in a useless reply must not stop the run.
        values = [text.encode(errors="replace").decode() for text in (reply, problem or "")]
        problem = values[1] if problem is not None else None
        row = (digest, values[0], problem, endpoint, spent.cost, spent.tokens)
        try:
            self._connection.execute(_KEEP, row)
            self._connection.commit()
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path}: {error}") from error

    def spent(self) -> Spent:
        """All that was spent through this file."""
        cost, tokens = self._connection.execute(
            "SELECT COALESCE(SUM(cost), 0), COALESCE(SUM(tokens), 0) FROM replies"
        ).fetchone()
        return Spent(float(cost), int(tokens))

"""SQLite cache of replies, so that a resumed run does not pay for them again."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from pathcore.chat_budget import Spent
from pathcore.files import StrPath

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    digest TEXT PRIMARY KEY, reply TEXT, problem TEXT, endpoint TEXT NOT NULL,
    cost REAL NOT NULL, tokens INTEGER NOT NULL, is_final INTEGER NOT NULL DEFAULT 0)"""
_KEEP = """INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET
    reply = excluded.reply, problem = excluded.problem, endpoint = excluded.endpoint,
    is_final = excluded.is_final,
    cost = cost + excluded.cost, tokens = tokens + excluded.tokens"""
_PATIENCE_S = 60.0  # how long to wait for another process that holds the lock of the database


@dataclass(frozen=True)
class Kept:
    """Text from the cache, and the endpoint that it came from."""

    text: str
    endpoint: str


class ReplyCache:
    """Replies by the digest of their request.

    Failures are stored for their cost, and refusals of the content so that the request is not
    repeated. Each reply is committed at once, so a killed process loses none.

    Args:
        path: SQLite file, created if missing.

    Raises:
        ValueError: If the file is not a cache of replies.
    """

    def __init__(self, path: StrPath) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=_PATIENCE_S)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(_TABLE)
            columns = [row[1] for row in self._connection.execute("PRAGMA table_info(replies)")]
            if "is_final" not in columns:  # written by a version without this column
                self._connection.execute(
                    "ALTER TABLE replies ADD COLUMN is_final INTEGER NOT NULL DEFAULT 0"
                )
            self._connection.commit()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: not a cache of replies: {error}") from error

    def close(self) -> None:
        """Closes the database."""
        self._connection.close()

    def get(self, digest: str) -> Kept | None:
        """Returns the usable reply to the request with this digest."""
        row = self._connection.execute(
            "SELECT reply, endpoint FROM replies WHERE digest = ? AND problem IS NULL", (digest,)
        ).fetchone()
        return Kept(*row) if row else None

    def verdict(self, digest: str) -> Kept | None:
        """Returns why the request with this digest was refused, if the refusal is final."""
        row = self._connection.execute(
            "SELECT problem, endpoint FROM replies WHERE digest = ? AND is_final", (digest,)
        ).fetchone()
        return Kept(*row) if row else None

    def keep(
        self,
        digest: str,
        reply: str,
        problem: str | None,
        endpoint: str,
        spent: Spent,
        *,
        is_final: bool = False,
    ) -> None:
        """Stores a reply, or the problem with it, and adds up its cost.

        Args:
            digest: Digest of the request.
            reply: Text of the reply.
            problem: Why the reply cannot be used; None for a usable one.
            endpoint: Endpoint that replied.
            spent: Cost and tokens of the request.
            is_final: Whether a repeated request would meet the same problem.

        Raises:
            OSError: If the file cannot be written, for instance because the disk is full.
        """
        # SQLite stores UTF-8; a lone surrogate in an unusable reply must not stop the run.
        values = [text.encode(errors="replace").decode() for text in (reply, problem or "")]
        problem = values[1] if problem is not None else None
        row = (digest, values[0], problem, endpoint, spent.cost, spent.tokens, int(is_final))
        try:
            self._connection.execute(_KEEP, row)
            self._connection.commit()
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path}: {error}") from error

    def spent(self) -> Spent:
        """Returns the total cost and tokens of all runs that used this cache."""
        cost, tokens = self._connection.execute(
            "SELECT COALESCE(SUM(cost), 0), COALESCE(SUM(tokens), 0) FROM replies"
        ).fetchone()
        return Spent(float(cost), int(tokens))

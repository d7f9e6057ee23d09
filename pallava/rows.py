"""Reads rows of LLaVA data files one by one, and limits the fraction of unusable rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_SKIPPED_SHARE = 0.1
"""Maximum fraction of unusable rows; more indicate a wrong folder or file."""

_FEW_ROWS = 10


def read_rows(data_path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yields `(line or element number, row)` of a `.json` array or a `.jsonl` file.

    Rows that are not JSON objects are yielded as they are, for the caller to record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is unknown, or a `.json` file does not hold an array.
    """
    path = Path(data_path)
    if not path.is_file():
        raise FileNotFoundError(f"data_path {path}: no such file")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:  # as bytes, so that an encoding error affects only its line
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield number, f"no JSON: {error}"
        return
    if path.suffix != ".json":
        raise ValueError(f"data_path {path}: expected .json or .jsonl, found {path.suffix!r}")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data_path {path}: no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"data_path {path}: expected an array of rows, found {type(rows).__name__}"
        )
    yield from enumerate(rows, start=1)


def pair_fault(row: Any) -> str | None:
    """Returns what is wrong with a row of a pairs file, or None."""
    if not isinstance(row, Mapping):
        return f"expected a JSON object, found {type(row).__name__}"
    if not isinstance(row.get("id"), str | int):
        return f"id: expected text or a whole number, found {row.get('id')!r}"
    for name in ("image", "caption"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name}: expected text, found {row.get(name)!r}"
        if "\0" in row[name] or not _is_unicode(row[name]):
            return f"{name}: {row[name]!r} holds characters that no text has"
    return None


def _is_unicode(text: str) -> bool:
    # JSON can escape a lone surrogate, which cannot be written to files or tokenized.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_share(
    num_bad: int,
    total: int,
    what: str,
    faults: Mapping[str, str],
    most: int = 3,
    max_share: float = MAX_SKIPPED_SHARE,
) -> None:
    """Tolerates a few bad rows, but raises if there are too many.

    Raises:
        ValueError: If more than `max_share` of at least ten rows are bad, or all of them.
    """
    if num_bad > max_share * total and num_bad > 0 and (num_bad == total or total >= _FEW_ROWS):
        shown = "\n  ".join(list(faults.values())[:most])
        raise ValueError(
            f"{what}: {num_bad} of {total} rows cannot be used, more than "
            f"{'a tenth' if max_share == MAX_SKIPPED_SHARE else f'{max_share:.0%}'}; the first:\n"
            f"  {shown}"
        )

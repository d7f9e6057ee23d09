"""Tables of images or slides with one label each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from pathcore.files import StrPath
from pathcore.rows import read_csv

Item = TypeVar("Item", bound=Hashable)


def read_label_table(
    table: StrPath, column: str, find: Callable[[str], Item], *, optional: Sequence[str] = ()
) -> tuple[dict[Item, dict[str, str]], list[dict[str, str]]]:
    """Reads a CSV of names and labels, in which each image or slide is named once.

    Args:
        table: CSV with columns `column` and `label`.
        column: Column of the names.
        find: Returns what a name denotes, such as its file, since it may be spelled in several
            ways; raises ValueError if there is none.
        optional: Further columns, which have no empty cells if the table has them.

    Returns:
        Rows by what they denote, without blanks around their values; and `id` and `reason` of rows
        that cannot be used or repeat an earlier one.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If a column is missing, or two rows contradict each other.
    """
    rows: dict[Item, dict[str, str]] = {}
    lines: dict[Item, int] = {}
    skipped = []
    for line, cells in read_csv(table, columns=(column, "label")):
        columns = (column, "label", *(key for key in optional if key in cells))
        row = {key: (cells[key] or "").strip() for key in columns}  # None where a row is too short
        name, place = row[column], f"table {table}:{line}"
        try:
            if None in cells:
                raise ValueError("more cells than the header has; put quotes around commas")
            if empty := [key for key, value in row.items() if not value]:
                raise ValueError(f"no {empty[0]}")
            if is_missing(row["label"]):
                raise ValueError("no label")
            item = find(name)
        except ValueError as error:
            skipped.append({"id": name or f"line {line}", "reason": f"{place}: {error}"})
            continue
        first = rows.setdefault(item, row)
        if first is row:
            lines[item] = line
            continue
        for key in columns[1:]:
            if first[key] != row[key]:
                raise ValueError(
                    f"{place}: {name}: {key} {row[key]!r}, but {first[key]!r} in line "
                    f"{lines[item]}; remove the wrong row"
                )
        reason = f"{place}: named twice, first in line {lines[item]}"
        skipped.append({"id": name, "reason": reason})
    return rows, skipped


def is_missing(label: str) -> bool:
    """Returns whether a label is empty or what pandas, R and Excel write for a missing value."""
    return label.lower() in ("", "nan", "na", "n/a", "#n/a", "<na>")

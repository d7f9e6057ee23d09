"""Reads and writes rows of JSON lines, JSON arrays and CSV tables as streams."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from pathcore.files import FolderInUseError, StrPath, atomic_file, folder_lock, write_text

MAX_SKIPPED_FRACTION = 0.1
"""Maximum fraction of unusable rows; more indicate a wrong folder or file."""

_FEW_ROWS = 10
_CSV_FIELD_BYTES = 10 << 20  # the csv module's default is 128 KiB
_CHUNK_CHARS = 1 << 20
_MAX_ELEMENT_CHARS = 64 << 20  # a damaged array must not be read into memory whole
_BLANKS = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")


class BadRow(str):
    """Result for a row that cannot be read; the text is the reason."""


def read_rows(path: StrPath, *, what: str = "rows") -> Iterator[tuple[int, Any]]:
    """Yields `(line or element number, row)` of a `.jsonl` file or a `.json` array.

    Rows may be any JSON values; callers must check them.

    Args:
        path: The file.
        what: Description of the file, for error messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the suffix is unknown, or a `.json` file is not an array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    if path.suffix == ".jsonl":
        yield from read_lines(path)
    elif path.suffix == ".json":
        yield from enumerate(read_array(path, what=what), start=1)
    else:
        raise ValueError(f"{what} {path}: expected .json or .jsonl, found {path.suffix!r}")


def read_rows_with_id(path: StrPath) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields `(line number, row)` of JSON lines; a valid row is an object with a string `id`.

    Lines are read strictly; see `parse_line`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is a JSON array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if first_byte(path) == b"[":
        raise ValueError(
            f"{path}: expected JSON lines, one object per line, found an array: "
            f"jq -c '.[]' {path.name}"
        )
    for number, row in read_lines(path, strict=True):
        if isinstance(row, BadRow):
            yield number, row
        elif not isinstance(row, dict):
            yield number, BadRow(f"expected an object, found {type(row).__name__}")
        elif not isinstance(row.get("id"), str) or not row["id"]:
            yield number, BadRow(f"id: expected text, found {row.get('id')!r:.80}")
        else:
            yield number, row


def read_lines(path: StrPath, *, strict: bool = False) -> Iterator[tuple[int, Any]]:
    """Yields `(line number, JSON value or BadRow)` for each line that is not blank.

    Raises:
        ValueError: If the file is UTF-16.
    """
    with open(path, "rb") as lines:  # as bytes, so that an encoding error affects only its line
        _refuse_utf16(lines.peek(2), path)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parse_line(line, strict=strict)


def parse_line(line: str | bytes, *, strict: bool = False) -> Any:
    """Returns the JSON value of a line, or a `BadRow`.

    Args:
        line: One line of JSON.
        strict: Whether to refuse values that Python accepts but other JSON readers do not: NaN,
            infinity and unpaired surrogates.
    """
    try:
        row = json.loads(line, parse_constant=_refuse_constant if strict else None)
        if strict:
            line.decode() if isinstance(line, bytes) else line.encode()
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return BadRow(f"no JSON: {error}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def first_byte(path: StrPath) -> bytes:
    """Returns the first byte of a file after white space and a byte order mark."""
    return _first_bytes(path).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _first_bytes(path: StrPath) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _refuse_utf16(beginning: bytes, name: StrPath) -> None:
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{name}: no JSON or CSV in UTF-8 but UTF-16, as some programs on Windows write; "
            "convert it: iconv -f utf-16 -t utf-8"
        )


def line_offsets(path: StrPath) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and content of each line that is not blank.

    Raises:
        ValueError: If the file is UTF-16.
    """
    offset = 0
    with open(path, "rb") as lines:
        _refuse_utf16(lines.peek(2), path)
        for line in lines:
            if line.strip():
                yield offset, line
            offset += len(line)


def read_array(path: StrPath, *, what: str = "rows") -> Iterator[Any]:
    """Yields the elements of a JSON array; memory grows with the largest element only.

    Raises:
        ValueError: If the file is not a valid array.
    """
    _refuse_utf16(_first_bytes(path), f"{what} {path}")
    if first_byte(path) == b"{":
        raise ValueError(
            f"{what} {path}: expected an array of rows, found an object; JSON lines are named "
            ".jsonl"
        )
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from _elements(file)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise ValueError(
                f"{what} {path}: no JSON array of rows, or it breaks off near byte "
                f"{os.lseek(file.fileno(), 0, os.SEEK_CUR):,} ({reason}); fetch the file again"
            ) from error


def _elements(file: IO[str]) -> Iterator[Any]:
    # Python's decoder, unlike ijson's, accepts NaN, which json.dump writes by default.
    decode = json.JSONDecoder().raw_decode
    text = file.read(_CHUNK_CHARS)
    at = _skip_blanks(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError("expected '['")
    at, is_first = at + 1, True
    scan, comma = json.JSONDecoder().scan_once, _COMMA.match  # type: ignore[attr-defined]
    while True:
        try:
            # The usual case: the element and a comma have been read.
            while not is_first:
                row, end = scan(text, at)
                found = comma(text, end)
                if found is None:
                    break
                yield row
                at = found.end()
        except (json.JSONDecodeError, StopIteration):
            pass  # tried again below, with more text
        try:
            start = _skip_blanks(text, at)
            if is_first and text[start] == "]":
                end = start
                break
            row, end = decode(text, start)
            end = _skip_blanks(text, end)
            if text[end] not in ",]":
                raise json.JSONDecodeError("expected ',' or ']'", text, end)
        except (json.JSONDecodeError, IndexError) as error:
            # The element may continue beyond what has been read.
            more = file.read(max(_CHUNK_CHARS, len(text) - at))
            if not more or len(text) - at > _MAX_ELEMENT_CHARS:
                raise ValueError(getattr(error, "msg", "the array has no end")) from error
            text, at = text[at:] + more, 0
            continue
        yield row
        if text[end] == "]":
            break
        at, is_first = _skip_blanks(text, end + 1), False
    if text[end + 1 :].strip() or file.read(_CHUNK_CHARS).strip():
        raise ValueError("more follows after the array")


def _skip_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None  # it matches the empty string
    return found.end()


def read_csv(
    path: StrPath,
    *,
    columns: Iterable[str] = (),
    delimiter: str = ",",
    what: str = "table",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields `(line number, {column: text})` of a CSV file with a header, like `csv.DictReader`.

    Args:
        path: The file, in UTF-8.
        columns: Required columns.
        delimiter: Character between fields.
        what: Description of the file, for error messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a column is missing or repeated, or the file is not CSV in UTF-8. The message
            names the line, for a row of several lines the first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    _refuse_utf16(_first_bytes(path), f"{what} {path}")
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Only a strict reader refuses a quotation mark that is never closed, which makes one field
        # of all that follows.
        reader = csv.DictReader(
            _utf8_lines(file, f"{what} {path}"), delimiter=delimiter, strict=True
        )
        line = 1
        try:
            found = reader.fieldnames or ()
            if missing := sorted(set(columns) - set(found)):
                raise ValueError(
                    f"{what} {path}:1: no column {' and no column '.join(missing)}; found "
                    f"{', '.join(found) or 'nothing'}"
                )
            # Spreadsheets leave several columns without a name.
            if repeated := sorted(name for name, n in Counter(found).items() if name and n > 1):
                raise ValueError(
                    f"{what} {path}:1: several columns are named {' and '.join(repeated)}; rename "
                    "or remove all but one"
                )
            line = reader.line_num + 1
            for row in reader:
                yield reader.line_num, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{what} {path}:{line}: no CSV: {error}; look in this row for a quotation mark "
                "that is not closed or not doubled"
            ) from error


def _utf8_lines(file: IO[str], name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            line.encode()
        except UnicodeEncodeError as error:  # an escaped byte
            raise ValueError(
                f"{name}:{number}: not UTF-8 (byte 0x{ord(line[error.start]) - 0xDC00:02x}); save "
                "it as CSV UTF-8, or convert it: iconv -f latin1 -t utf-8"
            ) from error
        yield line


def write_csv(path: StrPath, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Encodes a row as a line of JSON; unpaired surrogates, as in invalid input, are escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def write_rows(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines atomically."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.writelines(map(encode_row, rows))


def source_and_target(source: StrPath, out: StrPath) -> tuple[Path, Path]:
    """Returns the paths of a file to read and of a different one to write.

    Raises:
        FileNotFoundError: If `source` does not exist.
        ValueError: If `out` is `source`.
    """
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: would replace what is read; name another file")
    return source, out


@contextmanager
def row_files(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Opens output files that are renamed to their final names together, the first one last.

    Holds a lock on the first file, so that two runs cannot write it at once.

    Raises:
        ValueError: If another run is writing the first file.
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(paths[0].with_name(f".{paths[0].name}.lock")))
        except FolderInUseError as error:
            raise ValueError(f"{paths[0]}: another run is writing this file") from error
        # The lock makes constant names safe: a later run overwrites what a killed one left behind.
        partials = [
            stack.enter_context(atomic_file(path, partial_name=f".{path.name}.partial"))
            for path in paths
        ]
        with ExitStack() as opened:
            yield [opened.enter_context(partial.open("wb")) for partial in partials]


def row_digest(row: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a row, independent of the order of its fields."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def pair_fault(row: Any) -> str | None:
    """Returns what is wrong with a row of a pairs file; None if it is valid."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, Mapping):
        return f"expected a JSON object, found {type(row).__name__}"
    if not isinstance(row.get("id"), str | int):
        return f"id: expected text or a whole number, found {row.get('id')!r}"
    for name in ("image", "caption"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name}: expected text, found {row.get(name)!r}"
        if "\0" in row[name] or not is_encodable(row[name]):
            return f"{name}: {row[name]!r} holds characters that no text has"
    return None


def is_encodable(text: str) -> bool:
    """Returns whether a string has no unpaired surrogates, which UTF-8 cannot represent."""
    try:
        text.encode()  # a loop over the characters takes far longer
    except UnicodeEncodeError:
        return False
    return True


def check_fraction(
    num_bad: int,
    total: int,
    what: str,
    faults: Mapping[str, str],
    most: int = 3,
    max_fraction: float = MAX_SKIPPED_FRACTION,
) -> None:
    """Checks that not too many rows are bad.

    Raises:
        ValueError: If all rows are bad, or more than `max_fraction` of at least ten rows.
    """
    if num_bad > max_fraction * total and num_bad > 0 and (num_bad == total or total >= _FEW_ROWS):
        shown = "\n  ".join(list(faults.values())[:most])
        limit = "a tenth" if max_fraction == MAX_SKIPPED_FRACTION else f"{max_fraction:.0%}"
        raise ValueError(
            f"{what}: {num_bad} of {total} rows cannot be used, more than {limit}; the first:\n"
            f"  {shown}"
        )

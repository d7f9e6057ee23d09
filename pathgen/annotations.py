"""Reads PathGen's annotations (slide, position, caption) row by row and checks each of them.

The published file is one array of 1.6 million objects, 1.1 GB; JSON lines are read too. Fields:
`wsi_id` (in the data) or `WSI_id` (in the script of PathGen's README), `position` (left and top in
level-0 pixels, as strings or numbers), `caption`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from pathcore.files import StrPath, UnsafeNameError, check_name
from pathcore.rows import BadRow, first_byte, is_encodable, read_array, read_lines
from wsi.requests import NAME_ROOM_BYTES, PatchRequest, RejectedRow

PATCH_PX = 672
"""Side of PathGen's patches in level-0 pixels (https://github.com/PathGen-1-6M/PathGen-1.6M)."""

_NUMBER = re.compile(r"-?[0-9]{1,20}")
_MAX_POSITION = 2**31


class AnnotationError(ValueError):
    """Raised for a row that is not a valid annotation.

    Attributes:
        reason: Short reason, the same for all rows with this fault, so that faults can be counted.
        detail: What was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_annotations(
    path: StrPath, *, patch_px: int = PATCH_PX
) -> Iterator[PatchRequest | RejectedRow]:
    """Reads a file of annotations in constant memory.

    Args:
        path: A JSON array of objects, or one object per line.
        patch_px: Side of the patches in level-0 pixels.

    Yields:
        For each row, in order, the requested patch, or the reason why the row is invalid.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has neither format, or ends in the middle of the array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file")
    first = first_byte(path)
    if first == b"[":
        rows = read_array(path, what="annotations")
    elif first == b"{":
        rows = (row for _, row in read_lines(path))
    else:
        raise ValueError(
            f"annotations {path}: expected a JSON array of objects, or one object per line; it "
            f"begins with {first!r}"
        )
    for number, row in enumerate(rows, 1):
        try:
            slide_id, x, y, caption = parse_annotation(row)
        except AnnotationError as error:
            yield RejectedRow(number, error.reason, error.detail)
        else:
            yield PatchRequest(number, slide_id, x, y, patch_px, patch_px, caption)


def parse_annotation(row: Any) -> tuple[str, int, int, str]:
    """Checks one row.

    Args:
        row: A decoded JSON value.

    Returns:
        Slide id, left, top, caption.

    Raises:
        AnnotationError: If a field is missing or invalid.
    """
    if isinstance(row, BadRow):
        raise AnnotationError("bad row", row)
    if not isinstance(row, dict):
        raise AnnotationError("bad row", f"expected an object, found {row!r:.80}")
    slide_id = row["wsi_id"] if "wsi_id" in row else row.get("WSI_id")
    if slide_id is None:
        raise AnnotationError("bad id", f"no field wsi_id; fields: {sorted(map(str, row))!r:.80}")
    try:
        slide_id = _checked_name(slide_id) if isinstance(slide_id, str) else check_name(slide_id)
    except UnsafeNameError as error:
        raise AnnotationError("bad id", str(error)) from error
    position = row.get("position")
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise AnnotationError("bad position", f"expected two numbers, found {position!r:.80}")
    caption = row.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise AnnotationError("bad caption", f"expected text, found {caption!r:.80}")
    if "\0" in caption or not is_encodable(caption):
        raise AnnotationError("bad caption", f"{caption!r:.80} contains NUL or unpaired surrogates")
    return slide_id, _pixels(position[0]), _pixels(position[1]), caption


@lru_cache(maxsize=1 << 14)  # PathGen has 7,300 slides, in no order, with hundreds of rows each
def _checked_name(slide_id: str) -> str:
    return check_name(slide_id, room_bytes=NAME_ROOM_BYTES)


def _pixels(value: Any) -> int:
    """Reads a whole number or digits; `int` would also accept ' 7', '1_0', True and 10.9."""
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdigit():
        return int(value)  # nearly all positions, without the regular expression
    number: int | None = None
    if isinstance(value, str):
        number = int(value) if _NUMBER.fullmatch(value) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        number = int(value)
    if number is None:
        raise AnnotationError(
            "bad position", f"expected a whole number of pixels, found {value!r:.60}"
        )
    if not -_MAX_POSITION < number < _MAX_POSITION:
        raise AnnotationError("bad position", f"{number}: larger than any slide")
    return number

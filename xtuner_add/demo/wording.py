"""Words that the captions of both demos are made of."""

from __future__ import annotations

from collections.abc import Sequence


def look(vesicular: bool) -> str:
    """Returns the word for the look of the nuclei."""
    return "vesicular" if vesicular else "solid"


def listed(tissues: Sequence[str]) -> str:
    """Returns `a`, `a and b` or `a, b and c`."""
    *first, last = tissues
    return f"{', '.join(first)} and {last}" if first else last

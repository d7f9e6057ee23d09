"""Errors of wrong arguments, and suggestions for names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_LISTED = 20


class WrongArgumentError(ValueError):
    """Raised if an argument cannot be used as given; commands report it as wrong usage."""


class UnknownNameError(WrongArgumentError):
    """Raised if an argument is the name of nothing."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name.

    Case is ignored, and underscores match hyphens. A known name that contains the given one is
    similar, too.

    Args:
        name: The name that was given.
        known: Names that would have been accepted.

    Returns:
        Up to three similar names; without any, all known names if they are few, else nothing.

    Example:
        >>> did_you_mean("UNI2_H", ["uni", "uni2-h", "virchow"])
        '; did you mean uni2-h or uni?'
        >>> did_you_mean("resnet", ["uni", "uni2-h"])
        '; known: uni, uni2-h'
    """
    spellings: dict[str, str] = {}
    for candidate in known:
        spellings.setdefault(_plain(candidate), candidate)
    plain = _plain(str(name))
    near = difflib.get_close_matches(plain, spellings, n=3, cutoff=0.5)
    if len(plain) > 2:
        near += [other for other in spellings if plain in other and other not in near]
    if near:
        return f"; did you mean {' or '.join(spellings[other] for other in near[:3])}?"
    if 0 < len(spellings) <= _MAX_LISTED:
        return f"; known: {', '.join(sorted(spellings.values()))}"
    return ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")

"""Normalised words of questions and answers."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = {"a", "an", "the"}
_X_RAY = re.compile(r"\bx[\s-]?rays?\b")
# A hyphen or slash joins a word (cd3-positive, h/e); a stop or comma joins digits (1.5, 1,000).
_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:[-/&+']\w+)*\+?")


def words(text: str) -> list[str]:
    """Splits an answer into normalised words.

    Example:
        >>> words("The X-ray shows Barrett's esophagus (CD3 - positive).")
        ['xray', 'shows', 'barretts', 'esophagus', 'cd3-positive']
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    text = _X_RAY.sub("xray", text.replace(" - ", "-"))
    found = (word.replace("'", "") for word in _WORD.findall(text))
    return [word for word in found if word not in _ARTICLES]

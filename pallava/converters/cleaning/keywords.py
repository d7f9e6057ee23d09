"""Keyword rules for captions, with word lists as data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pathcore.files import StrPath

_PACKAGE = "pallava.converters.cleaning.words"
_LISTS = ("decisive", "keep", "ignore", "drop")


@dataclass(frozen=True)
class KeywordRule:
    """Lists of words and phrases; case is ignored, and an asterisk matches the rest of a word.

    First, all phrases of `ignore` are removed from the text. A text with a phrase of `decisive`
    passes. Otherwise a text is dropped if it contains a phrase of `drop`, or if `keep` is not empty
    and it contains none of its phrases.

    Attributes:
        decisive: Phrases that make a text pass regardless of others.
        keep: Phrases of which one is required, unless the list is empty.
        ignore: Phrases without meaning, such as `mouse monoclonal` in the name of an antibody.
        drop: Phrases that exclude a text.

    Example:
        >>> rule = KeywordRule(drop=("mouse",), ignore=("mouse anti-*",))
        >>> rule.fault("Mouse anti-CD20 stain of a node"), rule.fault("A mouse's liver")
        (None, "holds 'mouse'")
    """

    decisive: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def fault(self, text: str) -> str | None:
        """Returns the reason why a text is dropped, or None."""
        if self.ignore:
            text = self._patterns["ignore"].sub(" ", text)
        if self.decisive and self._patterns["decisive"].search(text):
            return None
        if self.drop and (found := self._patterns["drop"].search(text)):
            return f"holds {found.group().lower()!r}"
        if self.keep and not self._patterns["keep"].search(text):
            return "none of the words that are needed"
        return None

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {name: _pattern(getattr(self, name)) for name in _LISTS if getattr(self, name)}


def load_rule(name_or_file: StrPath) -> KeywordRule:
    """Loads a rule from a JSON file, or a shipped rule by name (`pathology`, `human`).

    Raises:
        FileNotFoundError: If the argument is neither a file nor a known name.
        ValueError: If the file is not of the form `{"decisive": [...], "keep": [...], ...}`.
    """
    path = Path(name_or_file)
    ours = resources.files(_PACKAGE) / f"{path.name}.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif path.name == str(name_or_file) and ours.is_file():
        text = ours.read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"keyword rule {name_or_file}: neither a file nor a rule of ours")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"keyword rule {name_or_file}: no JSON: {error}") from error
    return _rule(content, name_or_file)


def _rule(content: Any, name: StrPath) -> KeywordRule:
    if not isinstance(content, Mapping) or not set(content) <= {*_LISTS, "about"}:
        raise ValueError(f"keyword rule {name}: expected lists {', '.join(_LISTS)}")
    lists = {}
    for key in _LISTS:
        words = content.get(key, [])
        if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
            raise ValueError(f"keyword rule {name}: {key} must be a list of words")
        lists[key] = tuple(words)
    if not (lists["keep"] or lists["drop"]):
        raise ValueError(f"keyword rule {name}: neither keep nor drop, so every text passes")
    return KeywordRule(**lists)


def _pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    # Longest first, so that reports show "h&e stain" rather than "h&e".
    ordered = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(_phrase, ordered))})(?!\w)", re.IGNORECASE)


def _phrase(phrase: str) -> str:
    words = [re.escape(word).replace(r"\*", r"\w*") for word in phrase.split()]
    return r"\s+".join(words)

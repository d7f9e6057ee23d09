"""Replies of language models, read with distrust: whole, printable, of the asked form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_FENCE = re.compile(r"\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_SPACE = re.compile(r"\s+")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_QUOTES = {'"': '"', "\u201c": "\u201d"}


class ReplyError(ValueError):
    """A reply that cannot be used; the message can be told to the model."""


def read_reply(text: str, schema: Mapping[str, Any] | None) -> Any:
    r"""Reads a reply: plain text on one line, or JSON that fits the schema.

    Args:
        text: As the model gave it.
        schema: JSON schema; None for plain text.

    Raises:
        ReplyError: Empty, unprintable, no JSON, or not as the schema has it.

    Example:
        >>> read_reply('```json\n{"usable": true}\\n```', {"type": "object"})
        {'usable': True}
        >>> read_reply('"Dense stroma.\nFew nuclei."', None)
        'Dense stroma. Few nuclei.'
    """
    fenced = _FENCE.fullmatch(text)
    text = (fenced[1] if fenced else text).strip()
    if not text:
        raise ReplyError("the reply is empty")
    if schema is None:
        return clean_text(_unquoted(text))
    value = _clean(_first_object(text))
    import jsonschema

    error = next(jsonschema.Draft202012Validator(schema).iter_errors(value), None)
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the object"
        raise ReplyError(f"{where}: {error.message:.200}")
    return value


def clean_text(text: str) -> str:
    """One line of printable text.

    Raises:
        ReplyError: Nothing is left, or there are control characters or half surrogate pairs.
    """
    bad = _UNPRINTABLE.search(text)
    if bad:
        raise ReplyError(f"the reply holds the character {bad[0]!r}")
    text = _SPACE.sub(" ", text).strip()
    if not text:
        raise ReplyError("the reply is empty")
    return text


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        return text if text[0] in inner or text[-1] in inner else inner
    return text


def _first_object(text: str) -> Any:
    """The JSON object of a reply, also when words stand around it."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    raise ReplyError("the reply holds no JSON object")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value) if value.strip() else ""
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value

"""Extracts captions and JSON from replies of language models, and checks them.

`pathcore.chat_replies` removes reasoning and markup of the chat template; this module removes what
models write around a caption, and rejects replies that contain none. `docs/captions.md` describes
the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pathcore.chat_replies import (
    ReplyError,
    final_text,
    find_markup,
    last_json_object,
    strip_reasoning,
)

_FENCE = re.compile(r"```[\w-]*[ \t]*\n?(.*?)\n?\s*```", re.DOTALL)
_SPACE = re.compile(r"\s+")
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff]")
# Byte-level tokenizers decode incomplete UTF-8 to U+FFFD. `clean_text` strips it at both ends.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")
_QUOTES = {'"': '"', "\u201c": "\u201d", "'": "'", "\u00ab": "\u00bb", "`": "`"}
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
_HEADING = re.compile(r"\A\s*#{1,6}[ \t]+[^\n]{1,80}\n+(?=\s*\S)")
_INTRODUCTION = re.compile(
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok)\b[,.!]?\s*)?"
    r"(?:here(?:['\u2019]s| is)|below is) [^:.\n]{0,60}"
    r"\b(?:captions?|descriptions?|paragraph|version|summary|text|reply|answer)\b[^:.\n]{0,60}:\s+",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:(?:the|final|revised|corrected|detailed|image|updated|new)\s+)*"
    r"(?:caption|description|answer|response|output|paragraph|assistant|model)\s*:\s+"
    r"|(?:assistant|model)[ \t]*\n\s*",
    re.IGNORECASE,
)
_OBJECT = re.compile(r"\{\s*\"\w+\"\s*:")
_PLACEHOLDER = re.compile(
    r"\W*(?:nan|none|null|nil|n/?a|<na>|undefined|unknown|empty|tbd"
    r"|no (?:caption|description|text|reply|response|output|findings?))\W*",
    re.IGNORECASE,
)


def read_reply(text: str, schema: Mapping[str, Any] | None) -> Any:
    r"""Reads a reply: plain text on one line, or JSON that fits the schema.

    Args:
        text: Reply of the model, unmodified.
        schema: JSON schema; None for plain text.

    Raises:
        ReplyError: If the reply is empty, has unprintable characters, consists of reasoning only,
            or does not match the schema.

    Example:
        >>> read_reply('```json\n{"usable": true}\\n```', {"type": "object"})
        {'usable': True}
        >>> read_reply('"Dense stroma.\nFew nuclei."', None)
        'Dense stroma. Few nuclei.'
    """
    if schema is None:
        return read_caption(text)
    text = strip_reasoning(text)
    if not text.strip():
        raise ReplyError("the reply is empty")
    value = _clean(last_json_object(text))
    import jsonschema

    error = next(jsonschema.Draft202012Validator(schema).iter_errors(value), None)
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the object"
        raise ReplyError(f"{where}: {error.message:.200}")
    return value


def read_caption(text: str) -> str:
    """Returns the caption in a plain-text reply, on one line.

    Strips code fences, quotes, Markdown emphasis, headings, labels such as "Caption:" and
    introductions such as "Here is the description:". Of a JSON object, returns the field `caption`
    or `description`.

    Raises:
        ReplyError: If nothing printable is left, or only a placeholder such as "nan".
    """
    while (shorter := _unwrap(text)) != text:
        text = shorter
    if _PLACEHOLDER.fullmatch(text) or not any(map(str.isalpha, text)):
        raise ReplyError(f"the reply {text!r:.80} is a placeholder, not a text")
    if token := find_markup(text):
        raise ReplyError(f"the reply contains the token {token}")
    if "```" in text:
        raise ReplyError("expected plain text, but the reply contains a code fence")
    return text


def _unwrap(text: str) -> str:
    """Removes one layer of wrapping. The result is never longer, so that the loop ends."""
    text = strip_reasoning(text)
    if _OBJECT.search(text):
        return _caption_field(last_json_object(text))
    text = final_text(text)
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    text = _EMPHASIS.sub(r"\2", text)
    for pattern in (_HEADING, _INTRODUCTION, _LABEL):
        if found := pattern.match(text):
            text = text[found.end() :]
    return clean_text(_unquoted(text))


def _caption_field(value: Mapping[str, Any]) -> str:
    for name in ("caption", "description"):
        if isinstance(value.get(name), str):
            return str(value[name])
    raise ReplyError("expected plain text, but the reply is JSON")


def clean_text(text: str) -> str:
    """Returns the text on one line, without invisible characters.

    Raises:
        ReplyError: If the result is empty, or contains a control character, a lone surrogate, or
            U+FFFD other than at the ends.
    """
    text = text.strip("\ufffd \n\t\r")
    bad = _UNPRINTABLE.search(text)
    if bad:
        raise ReplyError(f"the reply contains the character {bad[0]!r}")
    text = _SPACE.sub(" ", _INVISIBLE.sub("", text)).strip()
    if not text:
        raise ReplyError("the reply is empty")
    return text


def _unquoted(text: str) -> str:
    text = text.strip()
    inner = text[1:-1]
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        return text if text[0] in inner or text[-1] in inner else inner
    return text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value) if value.strip() else ""
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value

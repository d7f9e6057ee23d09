"""Text of an answer while its tokens are generated."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pallava.inference.assistant import Assistant

FinishReason = Literal["stop", "length", "cancelled"]

_UNFINISHED = "\ufffd"  # a multi-byte character of which only some bytes have been generated
_LAST_SPACE = re.compile(r"\s(?=\S*$)")
_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Tokens that `clean_up_tokenization` of transformers joins to the preceding word."""
_IDEOGRAPHS = ("\u2e80", "\u9fff")  # scripts without spaces between words


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        text: Text of the answer.
        finish_reason: `stop` at the end of the answer, `length` at `max_new_tokens`, or
            `cancelled`.
        prompt_tokens: Number of prompt tokens, visual tokens included.
        completion_tokens: Number of generated tokens.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class AnswerText:
    """Decodes the tokens of one answer, passes new text on, and recognises the end.

    Args:
        assistant: Decodes and names the stop tokens and stop words.
        stop: Further strings that end the answer.
        on_text: Called with every piece of text that later tokens cannot change.
    """

    def __init__(
        self,
        assistant: Assistant,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self._assistant = assistant
        self._stop = stop
        self._on_text = on_text
        joined = getattr(assistant.tokenizer, "clean_up_tokenization_spaces", False)
        self._pending = (*stop, *assistant.stop_strings, *(_JOINED if joined else ()))
        self._given = ""
        self._ids: list[int] = []

    @property
    def ids(self) -> list[int]:
        """Tokens generated so far."""
        return self._ids

    def add(self, token: int) -> bool:
        """Adds a token; returns whether the answer ends with it."""
        self._ids.append(token)
        text, stopped = self._text()
        if not stopped:
            self._give(_settled(text, self._pending))
        return stopped or token in self._assistant.stop_ids

    def finish(self) -> str:
        """Passes on the remaining text and returns the whole answer."""
        text = self._text()[0]
        self._give(text)
        return text

    def _text(self) -> tuple[str, bool]:
        """Returns the answer so far, and whether a stop string ended it."""
        text = self._assistant.decode(self._ids)
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        stopped = bool(places) or self._assistant.has_stop_string(self._ids)
        return text[: min(places, default=len(text))], stopped

    def _give(self, text: str) -> None:
        if self._on_text is not None and len(text) > len(self._given):
            self._on_text(text[len(self._given) :])
            self._given = text


def _settled(text: str, pending: Sequence[str]) -> str:
    """Returns the part of an unfinished answer that later tokens cannot change.

    Args:
        text: Answer generated so far.
        pending: Strings that alter the text before them once they are complete, such as stop words.
    """
    text = text.rstrip(_UNFINISHED)
    end = len(text)
    if not (text and _IDEOGRAPHS[0] <= text[-1] <= _IDEOGRAPHS[1]):
        space = _LAST_SPACE.search(text)
        end = space.end() if space else 0
    for word in pending:
        for length in range(min(len(word) - 1, len(text)), 0, -1):
            if text.endswith(word[:length]):
                end = min(end, len(text) - length)
                break
    return text[:end].rstrip(_UNFINISHED)

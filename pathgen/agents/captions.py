"""The three agents that write captions: describe, revise, summarise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pathcore.chat_replies import ReplyError
from pathcore.files import StrPath
from pathgen.agents.prompts import Prompt, load_prompt
from pathgen.agents.replies import read_caption
from pathgen.agents.steps import Rejected, Step
from pathgen.filters import count_words, find_leak, find_loop, find_refusal

CLIP_TOKENS = 77
"""Context length of CLIP's text encoder, including start and end tokens (arXiv:2103.00020,
section 2.4, which counts 76, without the end token)."""

CountTokens = Callable[[str], int]
_MIN_SUMMARY_WORDS = 3


def describe(
    prompt_file: StrPath | None = None, *, min_words: int = 20, max_words: int = 250
) -> Step:
    """Returns the step that describes a patch in a detailed caption.

    Existing fields `caption` and `report` of a row are given to the model as notes.

    Args:
        prompt_file: Prompt that replaces the one of this package.
        min_words: Minimum number of words; shorter replies are requested again.
        max_words: Maximum number of words; longer replies are requested again.

    Raises:
        ValueError: If no number of words satisfies both bounds.
    """
    _check_words(min_words, max_words)

    def read(value: Any) -> str:
        return check_caption(_caption(value), min_words=min_words, max_words=max_words)

    settings = {"min_words": min_words, "max_words": max_words}
    return Step("describe", _prompts("describe", prompt_file), read, _replace, settings=settings)


def revise(
    prompt_file: StrPath | None = None, *, min_words: int = 20, max_words: int = 250
) -> Step:
    """Returns the step that checks a caption against image and report; corrects or rejects it."""
    _check_words(min_words, max_words)

    def read(value: Any) -> dict[str, Any]:
        if isinstance(value, str):  # a user-defined prompt may ask for plain text
            value = {"usable": True, "caption": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("usable"), bool):
            raise ReplyError("usable: expected true or false")
        if not value["usable"]:
            return {**value, "caption": ""}  # models return an empty caption here, or the old one
        caption = check_caption(_caption(value), min_words=min_words, max_words=max_words)
        return {**value, "caption": caption}

    def finish(row: dict[str, Any], _: str, value: dict[str, Any]) -> dict[str, Any]:
        found = value.get("problems") or []
        problems = [str(problem) for problem in (found if isinstance(found, list) else [found])]
        if not value["usable"]:
            raise Rejected("; ".join(problems) or "unusable; the model gave no reason")
        row = _replace(row, "revise", value["caption"])
        row["problems"] = problems
        return row

    return Step(
        "revise",
        _prompts("revise", prompt_file),
        read,
        finish,
        requires=("caption",),
        settings={"min_words": min_words, "max_words": max_words},
    )


def summarise(
    prompt_file: StrPath | None = None,
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int = CLIP_TOKENS,
    max_words: int = 60,
) -> Step:
    """Returns the step that shortens a caption to fit CLIP's text encoder.

    Args:
        prompt_file: Prompt that replaces the one of this package.
        count_tokens: Counts the tokens of a text, including start and end tokens; by default
            `clip_token_counter()`.
        max_tokens: Maximum number of tokens; longer replies are requested again.
        max_words: Maximum number of words; longer replies are requested again.

    Raises:
        ValueError: If `max_words` is below 3, the least that a caption has.
    """
    _check_words(_MIN_SUMMARY_WORDS, max_words)
    count = count_tokens or clip_token_counter()

    def read(value: Any) -> str:
        text = check_caption(_caption(value), min_words=_MIN_SUMMARY_WORDS, max_words=max_words)
        tokens = count(text)
        if tokens > max_tokens:
            raise ReplyError(f"{tokens} tokens are too many: {max_tokens} at most; write less")
        return text

    return Step(
        "summarise",
        _prompts("summarise", prompt_file),
        read,
        _replace,
        requires=("caption",),
        with_image=False,
        settings={"max_tokens": max_tokens, "max_words": max_words},
    )


def _check_words(min_words: int, max_words: int) -> None:
    # Otherwise every row would be asked about, and paid for, in vain.
    if min_words > max_words:
        raise ValueError(f"words: expected minimum <= maximum, found {min_words}..{max_words}")


def check_caption(text: str, *, min_words: int, max_words: int) -> str:
    """Returns the caption if it is usable.

    Raises:
        ReplyError: If the caption has too few or too many words, is a refusal, repeats itself, or
            mentions the notes that the model was given.
    """
    count = count_words(text)
    if not min_words <= count <= max_words:
        # Sent to the model as a correction: other words here change what it replies.
        raise ReplyError(f"{count} words; {min_words} to {max_words} are asked for")
    if words := find_refusal(text):
        raise ReplyError(f"it declines: {words!r}")
    if words := find_loop(text):
        raise ReplyError(f"it repeats itself: {words!r}")
    if words := find_leak(text):
        raise ReplyError(f"it mentions texts that the reader does not know: {words!r}")
    return text


def clip_token_counter() -> CountTokens:
    """Returns a function that counts CLIP tokens, including start and end tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text)) + 2


def _prompts(name: str, prompt_file: StrPath | None) -> dict[str, Prompt]:
    own = load_prompt(name)
    return {name: load_prompt(prompt_file, reply_of=own) if prompt_file else own}


def _caption(value: Any) -> str:
    """Returns the caption; a user-defined prompt may ask for it in an object."""
    caption = value.get("caption") if isinstance(value, Mapping) else value
    if not isinstance(caption, str):
        raise ReplyError("the field caption is missing or not a text")
    return read_caption(caption)


def _replace(row: dict[str, Any], step: str, caption: str) -> dict[str, Any]:
    """Replaces the caption; earlier ones stay in `versions`, under the names of their steps."""
    versions = dict(row.get("versions") or {})
    if not versions and row.get("caption"):
        versions["source"] = row["caption"]
    return {**row, "caption": caption, "versions": {**versions, step: caption}}

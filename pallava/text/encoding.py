"""Encodes conversations and prompts; images are marked by an id that no tokenizer uses."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
"""Values of LLaVA and XTuner, which keeps files and checkpoints interchangeable."""

_LITERAL = "\ufdd0"  # no character, so that no text contains it

Bos = Literal["single", "double"]


class ConversationError(ValueError):
    """Raised for a conversation that cannot be used; the message says which part is at fault."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer's interface that is used here."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of a text."""


def count_images(row: Mapping[str, Any]) -> int:
    """Counts the `<image>` tokens in the human turns of a LLaVA row."""
    return sum(
        str(turn.get("value") or "").count(IMAGE_TOKEN)
        for turn in row.get("conversations") or ()
        if turn.get("from") == "human"
    )


def image_files(row: Mapping[str, Any], field: str = "image") -> list[str]:
    """Returns the image files of a LLaVA row, whose field is a name, a list of names, or absent.

    Args:
        row: Row of a data file.
        field: Field that holds the names.

    Raises:
        ConversationError: If the field holds anything else, such as pandas' NaN for no image.

    Example:
        >>> image_files({"image": "a.png"}), image_files({})
        (['a.png'], [])
    """
    value = row.get(field)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if not _is_list(value, str):
        raise ConversationError(
            f"{field}: expected a file name or a list of them, found {value!r:.80}"
        )
    return list(value)


def interleaved_map_fn(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Converts a LLaVA row to question-answer pairs and keeps the positions of images.

    XTuner's `llava_map_fn` moves the image of a turn to its front and keeps only one; this function
    supports conversations about several images. Answers before the first question are dropped.

    Raises:
        ConversationError: If a role is neither human nor gpt.
    """
    question, pairs = "", []
    for index, turn in enumerate(row["conversations"]):
        role, value = turn.get("from"), turn.get("value") or ""
        if role == "human":
            question += value
        elif role == "gpt":
            if question:
                pairs.append({"input": question, "output": value})
            question = ""
        else:
            raise ConversationError(
                f"row {row.get('id')!r}: conversations[{index}].from is {role!r}, expected "
                "'human' or 'gpt'"
            )
    return {"conversation": pairs}


def check_row(row: Mapping[str, Any], field: str = "image") -> str | None:
    """Returns what is wrong with a LLaVA row whose images are in `field`, or None."""
    turns = row.get("conversations")
    if not _is_list(turns, Mapping) or not turns:
        return "conversations: expected a list of {from, value}"
    roles = {str(turn.get("from")) for turn in turns}
    if not roles <= {"human", "gpt"}:
        return f"conversations: expected roles 'human' and 'gpt', found {sorted(roles)}"
    for turn in turns:
        if fault := _text_fault(turn.get("value") or ""):
            return f"conversations: {fault}"
    while turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not any(turn["from"] == "gpt" for turn in turns):
        return "conversations: no question with an answer"
    for turn in turns:
        if not (turn.get("value") or "").strip():
            return f"conversations: an empty {'answer' if turn['from'] == 'gpt' else 'question'}"
    try:
        names = image_files(row, field)
    except ConversationError as error:
        return str(error)
    for name in (str(row.get("id", "")), *names):
        if fault := _text_fault(name):
            return f"id or {field}: {fault}"
    said = [turn for turn in turns if turn["from"] == "gpt"]
    if any(IMAGE_TOKEN in turn["value"] for turn in said):
        return f"conversations: an {IMAGE_TOKEN} mark in an answer; only questions show images"
    if any(a["from"] == b["from"] == "gpt" for a, b in pairwise(turns)):
        return "conversations: two answers to one question"
    files, marks = len(names), count_images({"conversations": turns})
    if files != marks:
        return f"{files} {field} file(s) but {marks} {IMAGE_TOKEN} mark(s)"
    return None


def _is_list(value: object, item_type: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, item_type) for item in value)


def _text_fault(value: object) -> str | None:
    if not isinstance(value, str):
        return f"expected text, found {type(value).__name__} {value!r:.80}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"no valid Unicode: {value!r:.80}"
    return None


def literal(tokenizer: Any, text: str, *words: str) -> str:
    """Marks what `encode_text` shall encode letter by letter: special tokens that a text spells.

    A text that contains `<|eot_id|>` would otherwise end its turn, and could go on as another
    speaker.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: Text of one turn, without template.
        words: Further words that are mere text.
    """
    return mark_literal(special_tokens(tokenizer, *words), text)


def mark_literal(pattern: re.Pattern[str], text: str) -> str:
    """Marks what a pattern of `special_tokens` finds, see `literal`."""
    return pattern.sub(rf"{_LITERAL}\g<0>{_LITERAL}", text.replace(_LITERAL, ""))


def special_tokens(tokenizer: Any, *words: str) -> re.Pattern[str]:
    """Returns a pattern of a tokenizer's special tokens and of `words`, without `<image>`."""
    # Of the added tokens alone: the whole vocabulary takes milliseconds to list.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(frozenset((added - {IMAGE_TOKEN}) | set(words)))


@functools.lru_cache(maxsize=16)
def _pattern(words: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def encode_text(tokenizer: Any, text: str, *, images: bool = True) -> list[int]:
    """Encodes text without BOS and EOS.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: Text, whose parts may be marked by `literal`.
        images: Whether `<image>` becomes `IMAGE_TOKEN_INDEX`.
    """
    ids: list[int] = []
    for number, part in enumerate(text.split(_LITERAL)):
        if number % 2:
            ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
            continue
        for index, piece in enumerate(part.split(IMAGE_TOKEN) if images else [part]):
            if index:
                ids.append(IMAGE_TOKEN_INDEX)
            if piece:  # a call that encodes nothing takes as long as one that encodes a sentence
                ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def encode_conversation(
    tokenizer: Tokenizer, conversation: Sequence[Mapping[str, Any]], max_length: int
) -> dict[str, list[int]]:
    """Encodes templated question-answer pairs for training, with one BOS and loss on the answers.

    Args:
        tokenizer: Hugging Face tokenizer.
        conversation: Pairs as returned by XTuner's `template_map_fn`: `input`, `output`, and
            optionally `need_eos_token`, `sep`, `output_with_loss`. Pairs that are `rendered` are
            the text of a chat template, which contains BOS and EOS.
        max_length: Maximum number of tokens; longer sequences are truncated.

    Returns:
        `input_ids` and `labels` of equal length; each image takes one id.
    """
    if conversation and conversation[0].get("rendered"):
        return _encode_rendered(tokenizer, conversation, max_length)
    input_ids: list[int] = []
    labels: list[int] = []

    def append(ids: list[int], *, learned: bool) -> None:
        input_ids.extend(ids)
        labels.extend(ids if learned else [IGNORE_INDEX] * len(ids))

    needs_bos = True
    for pair in conversation:
        if needs_bos and tokenizer.bos_token_id is not None:
            append([tokenizer.bos_token_id], learned=False)
        append(encode_text(tokenizer, pair["input"]), learned=False)
        learned = pair.get("output_with_loss", True)
        append(encode_text(tokenizer, pair["output"], images=False), learned=learned)
        # If the template's suffix ends the turn, neither EOS nor another BOS is added.
        needs_bos = pair.get("need_eos_token", True)
        if needs_bos and tokenizer.eos_token_id is not None:
            append([tokenizer.eos_token_id], learned=learned)
        if pair.get("sep"):
            append(tokenizer.encode(pair["sep"], add_special_tokens=False), learned=False)
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def _encode_rendered(
    tokenizer: Any, conversation: Sequence[Mapping[str, Any]], max_length: int
) -> dict[str, list[int]]:
    """Encodes the text of a chat template as a whole, as `apply_chat_template` does.

    Encoding it piece by piece would give other tokens where a tokenizer writes a space before the
    first word of a text, as SentencePiece does.
    """
    text, answers = "", []
    for pair in conversation:
        start = len(text) + len(pair["input"])
        text += pair["input"] + pair["output"]
        if pair.get("output_with_loss", True):
            answers.append((start, len(text)))
        text += pair.get("sep") or ""
    input_ids: list[int] = []
    labels: list[int] = []
    offset = 0
    for piece in re.split(f"({_LITERAL}.*?{_LITERAL}|{IMAGE_TOKEN})", text):
        if piece == IMAGE_TOKEN:
            input_ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            offset += len(IMAGE_TOKEN)
            continue
        is_literal = piece.startswith(_LITERAL)
        encoded = tokenizer(
            piece.strip(_LITERAL),
            add_special_tokens=False,
            split_special_tokens=is_literal,
            return_offsets_mapping=True,
        )
        offset += is_literal  # of the mark in front
        for token, (first, last) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            learned = any(a < offset + last and offset + first < b for a, b in answers)
            input_ids.append(token)
            labels.append(token if learned else IGNORE_INDEX)
        offset += len(piece) - is_literal
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def encode_prompt(
    tokenizer: Tokenizer, text: str, bos: Bos = "single", *, rendered: bool = False
) -> list[int]:
    """Encodes a templated question for generation.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: Templated question, with `<image>` tokens.
        bos: `single`, as in training; `double` reproduces the published evaluation tools, which
            prepend a second BOS, and with it the published scores.
        rendered: Whether the text comes from a chat template, which writes the BOS if there is one.
    """
    ids = encode_text(tokenizer, text)
    if tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id] * ((bos == "double") + (not rendered)) + ids

"""Conversations and prompts as token ids, image places marked by a number no tokenizer uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
"""The values of LLaVA and XTuner: files and checkpoints of either can be mixed with ours."""

Bos = Literal["single", "double"]


class ConversationError(ValueError):
    """A row that is no usable conversation; the message names the field."""


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the ids of a text."""


def count_images(row: Mapping[str, Any]) -> int:
    """How many `<image>` marks the human turns of a LLaVA row hold."""
    return sum(
        str(turn.get("value") or "").count(IMAGE_TOKEN)
        for turn in row.get("conversations") or ()
        if turn.get("from") == "human"
    )


def image_files(row: Mapping[str, Any], field: str = "image") -> list[str]:
    """The image files of a LLaVA row: `image` is one name, a list of names, or absent.

    Args:
        row: A row of a data file.
        field: Where the names stand.
    """
    value = row.get(field)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(name) for name in value]


def interleaved_map_fn(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Turns a LLaVA row into question-answer pairs, images where the author put them.

    XTuner's `llava_map_fn` moves the image of a turn to its front and keeps one; this one serves
    conversations about several images. Answers before the first question are dropped.

    Raises:
        ConversationError: A role other than human and gpt.
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
                f"row {row.get('id')!r}: conversations[{index}].from is {role!r}, 'human' or "
                "'gpt' expected"
            )
    return {"conversation": pairs}


def check_row(row: Mapping[str, Any], field: str = "image") -> str | None:
    """Says what is wrong with a LLaVA row, whose images stand in `field`, or None."""
    turns = row.get("conversations")
    if not _is_list(turns, Mapping) or not turns:
        return "conversations: a list of {from, value} expected"
    roles = {str(turn.get("from")) for turn in turns}
    if not roles <= {"human", "gpt"}:
        return f"conversations: roles 'human' and 'gpt' expected, got {sorted(roles)}"
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
    image = row.get(field)
    if image is not None and not isinstance(image, str) and not _is_list(image, str):
        return f"{field}: a file name or a list of them expected, got {image!r:.80}"
    for name in (str(row.get("id", "")), *image_files(row, field)):
        if fault := _text_fault(name):
            return f"id or {field}: {fault}"
    files, marks = len(image_files(row, field)), count_images({"conversations": turns})
    if files != marks:
        return f"{files} {field} file(s) but {marks} {IMAGE_TOKEN} mark(s)"
    return None


def _is_list(value: object, item_type: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, item_type) for item in value)


def _text_fault(value: object) -> str | None:
    if not isinstance(value, str):
        return f"text expected, got {type(value).__name__} {value!r:.80}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"no valid Unicode: {value!r:.80}"
    return None


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text whose `<image>` marks become `IMAGE_TOKEN_INDEX`; no BOS, no EOS."""
    ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def encode_conversation(
    tokenizer: Tokenizer, conversation: Sequence[Mapping[str, Any]], max_length: int
) -> dict[str, list[int]]:
    """Encodes templated question-answer pairs for training: one BOS, loss on the answers.

    Args:
        tokenizer: A Hugging Face tokenizer.
        conversation: Pairs as XTuner's `template_map_fn` leaves them: `input`, `output`, and
            optionally `need_eos_token`, `sep`, `output_with_loss`.
        max_length: Longer sequences are cut.

    Returns:
        `input_ids` and `labels`, equally long; images are one id each.
    """
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
        append(tokenizer.encode(pair["output"], add_special_tokens=False), learned=learned)
        # A template whose suffix ends the turn needs neither EOS nor another BOS.
        needs_bos = pair.get("need_eos_token", True)
        if needs_bos and tokenizer.eos_token_id is not None:
            append([tokenizer.eos_token_id], learned=learned)
        if pair.get("sep"):
            append(tokenizer.encode(pair["sep"], add_special_tokens=False), learned=False)
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def encode_prompt(tokenizer: Tokenizer, text: str, bos: Bos = "single") -> list[int]:
    """Encodes a templated question for generation.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The question in its template, `<image>` marks included.
        bos: `single`, as in training; `double` reproduces the published evaluation tools, which
            put a second BOS in front (and whose scores were made that way).
    """
    ids = encode_text(tokenizer, text)
    if tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id] * (2 if bos == "double" else 1) + ids

"""Encodes multi-turn conversations to the same token ids as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from pallava.text.chat_template import render_chat, template_of_tokenizer
from pallava.text.encoding import (
    IMAGE_TOKEN,
    Bos,
    encode_conversation,
    encode_prompt,
    encode_text,
    literal,
)
from pallava.text.templates import PromptTemplate
from pathcore.files import StrPath

Role = Literal["system", "user", "assistant"]

_MERE_TEXT = {"assistant": (IMAGE_TOKEN,)}
_WHOLE = 1 << 31  # longer than any conversation, so that nothing is truncated


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: Speaker of the message.
        text: Text without template. Images are placed in front of it unless it contains an
            `<image>` token for each of them.
        images: Pillow images, files, or outputs of `Assistant.pixel_values`; user turns only.
    """

    role: Role
    text: str
    images: tuple[Image.Image | StrPath | Tensor, ...] = ()


def check_turns(turns: Sequence[Turn]) -> None:
    """Rejects conversations of a form that does not occur in training.

    Raises:
        ValueError: If the conversation is not an optional system turn followed by alternating
            questions and answers that end with a question, or if images and `<image>` tokens do not
            match; only user turns can hold either, and `<image>` in an answer is text.
    """
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system text may only be the first turn of a conversation")
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != expected[: len(spoken)] or spoken[-1] != "user":
        raise ValueError(
            "expected user and assistant in turn, starting and ending with the user; got "
            f"{', '.join(spoken) or 'no turn'}"
        )
    for number, turn in enumerate(turns, 1):
        if turn.images and turn.role != "user":
            raise ValueError(f"turn {number}: only the user can show images, not {turn.role}")
        try:
            marked_text(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error


def marked_text(turn: Turn) -> str:
    """Returns the text of a turn with one `<image>` token per image.

    In an answer, `<image>` is something that the model wrote, and stays.

    Raises:
        ValueError: If the numbers of `<image>` tokens and images differ.
    """
    marks = 0 if turn.role == "assistant" else turn.text.count(IMAGE_TOKEN)
    if not marks:
        return f"{IMAGE_TOKEN}\n" * len(turn.images) + turn.text
    if marks != len(turn.images):
        raise ValueError(
            f"the {turn.role} text holds {marks} {IMAGE_TOKEN} mark(s) for {len(turn.images)} "
            "image(s); expected a mark for each image, or none"
        )
    return turn.text


def encode_turns(
    tokenizer: Any, template: PromptTemplate | None, turns: Sequence[Turn], bos: Bos = "single"
) -> list[int]:
    """Returns the token ids of a conversation up to where the next answer begins.

    Texts are encoded piece by piece, as `encode_conversation` does for training, because a
    tokenizer may merge characters on both sides of a boundary.

    Args:
        tokenizer: Tokenizer of the language model.
        template: Prompt template; None for the tokenizer's own chat template.
        turns: Conversation; see `check_turns`.
        bos: See `encode_prompt`; `double` applies to the first question.

    Raises:
        ValueError: If the template cannot express the conversation.
    """
    check_turns(turns)
    # What the template adds keeps its special tokens; those in the texts of turns are mere text.
    turns = [
        replace(turn, text=literal(tokenizer, turn.text, *_MERE_TEXT.get(turn.role, ())))
        for turn in turns
    ]
    template = template or template_of_tokenizer(tokenizer)
    if template.chat_template is not None:
        return _encode_rendered(tokenizer, template, turns, bos)
    system = turns[0].text if turns[0].role == "system" else ""
    spoken = turns[1:] if turns[0].role == "system" else turns
    questions = [
        template.render(marked_text(turn), "" if index else system, index + 1)
        for index, turn in enumerate(spoken[::2])
    ]
    pairs = [
        {
            "input": question,
            "output": answer.text + template.suffix,
            "need_eos_token": not template.ends_with_suffix,
            "sep": template.sep,
        }
        for question, answer in zip(questions, spoken[1::2], strict=False)
    ]
    if not pairs:
        return encode_prompt(tokenizer, questions[-1], bos)
    ids = encode_conversation(tokenizer, pairs, _WHOLE)["input_ids"]
    if bos == "double" and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if template.ends_with_suffix:
        return ids + encode_text(tokenizer, questions[-1])
    return ids + encode_prompt(tokenizer, questions[-1])


def _encode_rendered(
    tokenizer: Any, template: PromptTemplate, turns: Sequence[Turn], bos: Bos
) -> list[int]:
    """Encodes with a chat template, which writes the BOS itself if it wants one."""
    messages = [{"role": turn.role, "content": marked_text(turn)} for turn in turns]
    return encode_prompt(tokenizer, render_chat(tokenizer, template, messages), bos, rendered=True)

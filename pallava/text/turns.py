"""Conversations of several turns as the token ids that training gives the same conversation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from pallava.text.chat_template import known_template
from pallava.text.encoding import IMAGE_TOKEN, Bos, encode_conversation, encode_prompt, encode_text
from pallava.text.templates import PromptTemplate

Role = Literal["system", "user", "assistant"]

_WHOLE = 1 << 31  # longer than any conversation: nothing is cut


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: Who speaks.
        text: Without template. Images stand in front of it, unless it holds as many `<image>`
            marks as there are images.
        images: Pillow images, files, or what `Assistant.pixel_values` made of them; only the user
            has them.
    """

    role: Role
    text: str
    images: tuple[Image.Image | str | os.PathLike[str] | Tensor, ...] = ()


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuses conversations that training never shows.

    Raises:
        ValueError: Not a system text or none, then questions and answers in turn, a question last;
            or images and marks that do not agree.
    """
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system text may only be the first turn of a conversation")
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != expected[: len(spoken)] or spoken[-1] != "user":
        raise ValueError(
            "user and assistant in turn expected, first and last the user; got "
            f"{', '.join(spoken) or 'no turn'}"
        )
    for number, turn in enumerate(turns, 1):
        if turn.images and turn.role != "user":
            raise ValueError(f"turn {number}: only the user can show images, not {turn.role}")
        if turn.role == "user":
            question_text(turn)


def question_text(turn: Turn) -> str:
    """Text of a user's turn with one `<image>` mark an image.

    Raises:
        ValueError: Another number of marks than of images.
    """
    marks = turn.text.count(IMAGE_TOKEN)
    if not marks:
        return f"{IMAGE_TOKEN}\n" * len(turn.images) + turn.text
    if marks != len(turn.images):
        raise ValueError(
            f"the text holds {marks} {IMAGE_TOKEN} mark(s) for {len(turn.images)} image(s)"
        )
    return turn.text


def encode_turns(
    tokenizer: Any, template: PromptTemplate | None, turns: Sequence[Turn], bos: Bos = "single"
) -> list[int]:
    """Token ids of a conversation up to where the next answer begins.

    Piece by piece as `encode_conversation` encodes them for training, since a tokenizer may join
    what stands on either side of a cut.

    Args:
        tokenizer: Of the language model.
        template: The prompt template; None for the chat template that the tokenizer carries.
        turns: See `check_turns`.
        bos: See `encode_prompt`; `double` concerns the first question.

    Raises:
        ValueError: A conversation that the template cannot express.
    """
    check_turns(turns)
    template = template or known_template(tokenizer.chat_template)
    if template is None:
        return _encode_rendered(tokenizer, turns, bos)
    system = turns[0].text if turns[0].role == "system" else ""
    spoken = turns[1:] if turns[0].role == "system" else turns
    questions = [
        template.render(question_text(turn), "" if index else system, index + 1)
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


def _encode_rendered(tokenizer: Any, turns: Sequence[Turn], bos: Bos) -> list[int]:
    """With a chat template of unknown origin, cut where answers begin and end if it can be."""
    messages = [
        {"role": turn.role, "content": question_text(turn) if turn.role == "user" else turn.text}
        for turn in turns
    ]
    pieces: list[str] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "system":
            continue
        text = tokenizer.apply_chat_template(
            messages[:number], tokenize=False, add_generation_prompt=message["role"] == "user"
        )
        done = "".join(pieces)
        # A template may write the past differently; then there is nothing to cut.
        pieces = [*pieces, text[len(done) :]] if text.startswith(done) else [text]
    first = pieces[0].removeprefix(tokenizer.bos_token or "")  # encode_prompt adds it
    ids = encode_prompt(tokenizer, first, bos)
    for piece in pieces[1:]:
        ids += encode_text(tokenizer, piece)
    return ids

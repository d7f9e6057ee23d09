"""Instruction data from captions: conversations, detailed descriptions, open and closed questions.

Rows come out in the LLaVA schema: `id`, `image`, `conversations` `[{from: human|gpt, value}]`.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from pathcore.chat_replies import ReplyError, find_markup
from pathgen.agents.prompts import load_prompt
from pathgen.agents.steps import Step
from pathgen.filters import count_words, find_leak, find_loop, find_refusal

KINDS = ("conversation", "detail", "open", "closed")
"""A talk of several turns, one long description, questions with free and with given answers."""

IMAGE_MARK = "<image>"


def make_instructions(
    shares: Mapping[str, float] | None = None,
    *,
    every_kind: bool = False,
    with_image: bool = False,
    seed: int = 0,
) -> Step:
    """The step that turns captions into instruction data.

    Args:
        shares: Kind -> weight; each caption is given one kind, drawn by its id. By default all
            kinds equally.
        every_kind: Make each kind from each caption instead.
        with_image: Let the model see the image beside the caption.
        seed: Of the draw, of the order of choices and of the question for descriptions.

    Raises:
        ValueError: An unknown kind, or weights that make no sense.
    """
    shares = dict(shares or dict.fromkeys(KINDS, 1.0))
    unknown = set(shares) - set(KINDS)
    if unknown or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"kinds: expected weights for some of {', '.join(KINDS)}, found {shares}")
    kinds = [kind for kind in KINDS if shares.get(kind, 0) > 0]

    def choose(row: Mapping[str, Any]) -> Sequence[str]:
        if every_kind:
            return kinds
        return _draw(seed, row["id"], "kind").choices(kinds, [shares[kind] for kind in kinds])

    def finish(row: dict[str, Any], kind: str, value: Any) -> dict[str, Any]:
        turns = _turns(kind, value, _draw(seed, row["id"], kind))
        if row.get("image"):
            turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        out = {key: row[key] for key in ("image", "wsi_id", "source", "licence") if row.get(key)}
        conversations = [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return {"id": f"{row['id']}-{kind}", **out, "kind": kind, "conversations": conversations}

    return Step(
        "make-instructions",
        {kind: load_prompt(f"instruct_{kind}") for kind in kinds},
        _read,
        finish,
        choose=choose,
        requires=("caption",),
        with_image=with_image,
        settings={"shares": shares, "every_kind": every_kind, "seed": seed},
    )


def _read(value: Any) -> Any:
    """Checks a reply of any kind: right choices, no refusals, no word about the caption."""
    for item in value.get("pairs", ()) if isinstance(value, Mapping) else ():
        if "choices" in item and item["answer"] not in item["choices"]:
            raise ReplyError(f"the answer {item['answer']!r:.80} is none of the choices")
    texts = [value] if isinstance(value, str) else list(_texts(value))
    for text in texts:
        if not text:
            raise ReplyError("a question or an answer is empty")
        if token := find_markup(text):
            raise ReplyError(f"it holds the token {token}")
        if words := find_loop(text):
            raise ReplyError(f"it repeats itself: {words!r}")
        if words := find_refusal(text) or find_leak(text):
            raise ReplyError(f"it speaks of more than the image: {words!r}")
    if isinstance(value, str) and count_words(value) < 20:
        raise ReplyError("fewer than 20 words are no detailed description")
    return value


def _texts(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [text for item in items for text in _texts(item)]


def _turns(kind: str, value: Any, draw: random.Random) -> list[tuple[str, str]]:
    if kind == "detail":
        return [(draw.choice(_detail_questions()), value)]
    if kind == "closed":
        return [_closed(pair, draw) for pair in value["pairs"]]
    pairs = value["turns" if kind == "conversation" else "pairs"]
    return [(pair["question"], pair["answer"]) for pair in pairs]


def _closed(pair: Mapping[str, Any], draw: random.Random) -> tuple[str, str]:
    """Models favour the first letter for the right answer, so the order is drawn anew."""
    choices, answer = list(pair["choices"]), pair["answer"]
    if {choice.casefold() for choice in choices} == {"yes", "no"}:
        return f"{pair['question']} Answer yes or no.", answer
    draw.shuffle(choices)
    letters = string.ascii_uppercase
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    question = "\n".join([pair["question"], *lines, "Answer with the letter and the choice."])
    return question, lines[choices.index(answer)]


def _detail_questions() -> list[str]:
    text = (files("pathgen.prompts") / "detail_questions.json").read_text(encoding="utf-8")
    questions: list[str] = json.loads(text)
    return questions


def _draw(seed: int, *names: str) -> random.Random:
    """The same draw for the same row, in whatever order rows come."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))

"""Instruction data from captions: conversations, detailed descriptions, open and closed questions.

Output rows follow the LLaVA schema: `id`, `image`, `conversations` `[{from: human|gpt, value}]`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from pathcore.chat_replies import ReplyError, find_markup
from pathgen.agents.prompts import load_prompt
from pathgen.agents.steps import Step
from pathgen.filters import count_words, find_leak, find_loop, find_refusal

KINDS = ("conversation", "detail", "open", "closed")
"""Conversation of several turns, one long description, questions without and with choices."""

IMAGE_MARK = "<image>"

_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s+(?=\S)")


def make_instructions(
    weights: Mapping[str, float] | None = None,
    *,
    every_kind: bool = False,
    with_image: bool = False,
    seed: int = 0,
) -> Step:
    """Returns the step that turns captions into instruction data.

    Args:
        weights: Kind -> weight. Each caption gets one kind, drawn at random from the seed and the
            row's id. By default all kinds are equally likely.
        every_kind: Whether to make every kind from every caption instead.
        with_image: Whether the model sees the image in addition to the caption.
        seed: Seed of the draw of kinds, order of choices and question for descriptions.

    Raises:
        ValueError: If a kind is unknown, a weight is negative, or all weights are 0.
    """
    weights = dict(weights or dict.fromkeys(KINDS, 1.0))
    unknown = set(weights) - set(KINDS)
    if unknown or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"kinds: expected weights for some of {', '.join(KINDS)}, found {weights}")
    kinds = [kind for kind in KINDS if weights.get(kind, 0) > 0]

    def choose(row: Mapping[str, Any]) -> Sequence[str]:
        if every_kind:
            return kinds
        return _seeded_random(seed, row["id"], "kind").choices(
            kinds, [weights[kind] for kind in kinds]
        )

    def finish(row: dict[str, Any], kind: str, value: Any) -> dict[str, Any]:
        turns = _turns(kind, value, _seeded_random(seed, row["id"], kind))
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
        settings={"weights": weights, "every_kind": every_kind, "seed": seed},
    )


def _read(value: Any) -> Any:
    """Checks a reply: answers among the choices, no refusal, no mention of unseen texts."""
    for item in value.get("pairs", ()) if isinstance(value, Mapping) else ():
        if "choices" in item and item["answer"] not in item["choices"]:
            raise ReplyError(f"the answer {item['answer']!r:.80} is not among the choices")
    texts = [value] if isinstance(value, str) else list(_texts(value))
    for text in texts:
        if not text:
            raise ReplyError("a question or an answer is empty")
        if token := find_markup(text):
            raise ReplyError(f"it contains the token {token}")
        if words := find_loop(text):
            raise ReplyError(f"it repeats itself: {words!r}")
        if words := find_refusal(text) or find_leak(text):
            raise ReplyError(f"it mentions more than the image shows: {words!r}")
    if isinstance(value, str) and count_words(value) < 20:
        raise ReplyError("a detailed description has at least 20 words")
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
    # Models tend to put the right answer first, so the choices are shuffled.
    choices, answer = _unlabelled(pair["choices"], pair["answer"])
    if {choice.casefold() for choice in choices} == {"yes", "no"}:
        return f"{pair['question']} Answer yes or no.", answer
    draw.shuffle(choices)
    letters = string.ascii_uppercase
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    question = "\n".join([pair["question"], *lines, "Answer with the letter and the choice."])
    return question, lines[choices.index(answer)]


def _unlabelled(choices: Sequence[str], answer: str) -> tuple[list[str], str]:
    """Removes letters that the model has put before the choices, which are about to be shuffled."""
    found = [_LABEL.match(choice) for choice in choices]
    letters = string.ascii_uppercase[: len(found)]
    if [label and label[1].upper() for label in found] != list(letters):
        return list(choices), answer
    texts = [choice[label.end() :] for choice, label in zip(choices, found, strict=True) if label]
    return texts, texts[choices.index(answer)]


def _detail_questions() -> list[str]:
    text = (files("pathgen.prompts") / "detail_questions.json").read_text(encoding="utf-8")
    questions: list[str] = json.loads(text)
    return questions


def _seeded_random(seed: int, *names: str) -> random.Random:
    """Returns a generator that depends on seed and names only, not on the order of rows."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))

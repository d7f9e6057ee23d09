"""Reading the chosen letter from what a model says about a multiple-choice question."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pallava.evaluation.metrics.text import words

_LETTER = r"([A-Za-z])"
# The whole answer is a letter in some dress: "D", "(b)", " c. ", "**A**", "d)".
_ALONE = re.compile(rf"\W*{_LETTER}\W*")
# It starts with a letter and a sign that ends it: "B: x", "(b) x", "C. x", "**D** x", "a) x".
_LEADING = re.compile(rf"\s*(?:[(\[*]+\s*{_LETTER}\s*[)\]*]+|{_LETTER}\s*[:.)\]])(?=\W|\w|$)")
# "the answer is D", "Answer: (b)", "correct option would be C", "I choose B", "option C".
_STATED = re.compile(
    r"\b(?i:answers?|options?|choices?|choose|select|pick)\b"
    r"(?:\s+(?i:is|are|was|would|should|must|be|option|choice|letter|correct|most|likely)\b)*"
    r"[\s:=*(\[\"'-]*"
    r"(?:([A-Z])\b(?!['-])|([a-z])(?=\s*(?:[).:,;*\]\"']|$)))"
)
# "D is correct", "(D) is the right answer": capital letters only, since "a" is also a word.
_SUBJECT = re.compile(r"(?:^|[\s(*\"'])([A-Z])[)*\"']*\s+is\s+(?:the\s+)?(?:correct|right|best)\b")


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Finds the letter an answer stands for.

    A letter by itself, at the start with a sign that ends it, or named as the answer; otherwise
    the text of exactly one option.

    Args:
        answer: What the model said.
        options: Capital letter -> text of the option; texts may be empty.

    Returns:
        One of the letters, or None when the answer names none, or several.

    Example:
        >>> options = {"A": "necrosis", "B": "fibrosis"}
        >>> [parse_choice(text, options) for text in ("The answer is B", " a: x", "fibrosis.")]
        ['B', 'A', 'B']
    """
    for pattern, whole in ((_ALONE, True), (_LEADING, False)):
        match = pattern.fullmatch(answer) if whole else pattern.match(answer)
        if match:
            letter = _group(match)
            if letter in options:
                return letter
    stated = {_group(match) for match in _STATED.finditer(answer)} & set(options)
    stated |= {_group(match) for match in _SUBJECT.finditer(answer)} & set(options)
    if stated:
        return stated.pop() if len(stated) == 1 else None
    return _by_text(answer, options)


def strip_letter(text: str, letter: str) -> str:
    """Removes an option's own letter from its text: published files write ` A: necrosis `."""
    match = re.match(rf"\s*{re.escape(letter)}\s*[:.)]\s*", text, flags=re.IGNORECASE)
    return (text[match.end() :] if match else text).strip()


def _group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    said = words(answer)
    texts = {letter: words(text) for letter, text in options.items()}
    equal = [letter for letter, text in texts.items() if text and text == said]
    if equal:
        return equal[0] if len(equal) == 1 else None
    inside = [letter for letter, text in texts.items() if text and contains(said, text)]
    # "Invasive carcinoma" holds the option "carcinoma" too: the longer one is meant.
    longest = [
        letter
        for letter in inside
        if not any(
            other != letter
            and len(texts[other]) > len(texts[letter])
            and contains(texts[other], texts[letter])
            for other in inside
        )
    ]
    return longest[0] if len(longest) == 1 else None


def contains(sequence: list[str], part: list[str]) -> bool:
    """Whether one list of words occurs in another, in order and without gaps."""
    width = len(part)
    return any(
        sequence[start : start + width] == part for start in range(len(sequence) - width + 1)
    )

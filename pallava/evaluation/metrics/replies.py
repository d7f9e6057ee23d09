"""Extracts the answer from a reply by removing reasoning, tags and markup."""

from __future__ import annotations

import re
import unicodedata

_REASONING = r"think|thinking|thought|thoughts|reasoning|reason|scratchpad|reflection|analysis"
_OPENED = (
    rf"(?:<(?:{_REASONING})>|\[(?:THINK|THINKING|REASONING)\]"
    r"|\u25c1think\u25b7|<\|begin_of_thought\|>)"
)
_CLOSED = (
    rf"(?:</(?:{_REASONING})>|\[/(?:THINK|THINKING|REASONING)\]"
    r"|\u25c1/think\u25b7|<\|end_of_thought\|>)"
)
_BEGINNING, _END = (re.compile(mark, re.IGNORECASE) for mark in (_OPENED, _CLOSED))
_ANSWER_TAG = re.compile(
    r"(?:<(?:answer|final_answer|final)>|\[ANSWER\])(.*?)"
    r"(?:</(?:answer|final_answer|final)>|\[/ANSWER\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
# Tokens of chat templates: <|eot_id|>, <|im_end|>, </s>, <pad>.
_SPECIAL = re.compile(r"<\|[\w/ -]{1,40}\|>|</?s>|<(?:pad|unk|eos|bos|image)>|\[/?INST\]")
_SPEAKER = re.compile(r"\s*(?:assistant|gpt|model|bot)\s*:\s*", re.IGNORECASE)
# A model that misses its stop token continues with an invented turn.
_NEXT_TURN = re.compile(r"\n\s*(?:#+\s*)?(?:question|human|user|instruction|q)\s*:", re.IGNORECASE)


def answer_part(reply: str) -> str:
    """Returns a reply without reasoning, chat template tokens and later turns.

    Reasoning is the content of `<think>` and similar tags. If only the end of such a block is
    present because the template opened it, the answer begins after the last end tag. If only the
    beginning is present, the reply was truncated before an answer, and the result is empty. If
    there is an `<answer>` tag, the content of the last one is the whole answer.

    Example:
        >>> answer_part("<think>Could be A.</think>The answer is B.<|eot_id|>")
        'The answer is B.'
        >>> answer_part("<think>Could be A.")
        ''
    """
    text = _without_reasoning(reply)
    tagged = _ANSWER_TAG.findall(text)
    if tagged:
        text = tagged[-1]
    text = _SPECIAL.sub(" ", text)
    if speaker := _SPEAKER.match(text):
        text = text[speaker.end() :]
    turn = _NEXT_TURN.search(text)
    if turn and text[: turn.start()].strip():
        text = text[: turn.start()]
    return text.strip()


def _without_reasoning(text: str) -> str:
    # A manual scan, because a regular expression that spans a block is quadratic on long replies.
    kept, place = [], 0
    while beginning := _BEGINNING.search(text, place):
        kept.append(text[place : beginning.start()])
        end = _END.search(text, beginning.end())
        if end is None:  # truncated during reasoning
            place = len(text)
            break
        place = end.end()
    kept.append(text[place:])
    rest = " ".join(kept)
    *_, last = [None, *_END.finditer(rest)]  # end of a block that the template opened
    return rest if last is None else rest[last.end() :]


_LATEX = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|rm|it|sf|bb)|mbox|emph)\s*\{([^{}]*)\}"
)
_BOXED = re.compile(
    r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}|\\(?:boxed|fbox)\s+([A-Za-z])\b"
)
_LINE_START = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-*+\u2022][ \t]+|\d{1,2}[.)][ \t]+)+", re.MULTILINE
)
_PAIRED_HTML = re.compile(
    r"<(b|i|em|strong|u|code|p|span|mark)>(.*?)</\1>", re.DOTALL | re.IGNORECASE
)


def plain(text: str) -> str:
    r"""Returns text without Markdown, HTML emphasis and LaTeX text commands.

    Example:
        >>> plain("## Answer\n- **B**: $\\text{fibrosis}$")
        'Answer\nB: fibrosis'
    """
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("\u2018", "'").replace("\u2019", "'").replace("\u3002", ". ")
    text = text.replace("\u201c", '"').replace("\u201d", '"')
    for _ in range(2):  # \textbf{\text{B}}, <p><b>B</b></p>
        text = _LATEX.sub(r"\1", text)
        text = _PAIRED_HTML.sub(r"\2", text)
    text = re.sub(r"\\[()\[\]]|\$", "", text)
    text = re.sub(r"~~.*?~~", " ", text)  # strikethrough
    text = re.sub(r"[*`]+|(?<!\w)_+|_+(?!\w)", "", _LINE_START.sub("", text))
    return text.strip()


def boxed(text: str) -> list[str]:
    r"""Returns the contents of `\boxed{...}`, in order."""
    return [first or second for first, second in _BOXED.findall(text)]

"""What a chat model's reply says: without its reasoning, its chat template's tokens, its fences.

The grammar is written down in `docs/captions.md`. It serves every program that reads replies of
language models: the captioning steps and the judge of free-text answers.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_REPLY_CHARS = 200_000
"""Far above any `max_tokens` in use; parsing time grows with the square of some malformed texts."""


class ReplyError(ValueError):
    """A reply that cannot be used. The message can be sent back to the model."""


_REASONING = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
# Tags of Qwen, DeepSeek, Seed and most fine-tunes; of Magistral; of Kimi.
_REASONING_OPEN = re.compile(rf"<{_REASONING}>|\[THINK\]|◁think▷", re.IGNORECASE)
_REASONING_CLOSE = re.compile(rf"</{_REASONING}>|\[/THINK\]|◁/think▷", re.IGNORECASE)

# gpt-oss ("harmony"): the reply proper is the message of the channel "final". Servers that drop
# special tokens leave the bare words of the second form.
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_FINAL_CHANNEL_BARE = re.compile(r"\A\s*analysis(?![a-z]).*assistantfinal", re.DOTALL)

_ANSWER = r"(?:final_)?(?:answer|response|output|caption|description|final)"
_ANSWER_OPEN = re.compile(rf"<{_ANSWER}>|<\|begin_of_box\|>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(rf"</{_ANSWER}>|<\|end_of_box\|>", re.IGNORECASE)

_NAMED_TOKENS = (
    r"s|bos|eos|pad|unk|cls|sep|mask|eot|eod|eom|image|images|img|video|audio|image_soft_token|"
    r"start_of_turn|end_of_turn|start_of_image|end_of_image|end_of_utterance|end_of_text|"
    r"endoftext|image_placeholder|image_start|image_end|im_start|im_end|im_patch|im_content|"
    r"IMG_CONTEXT|IMAGE|fake_token_around_image|global-img|row_\d+_col_\d+|unused\d+|extra_id_\d+"
)
_TOKEN = (
    r"(?:<\|[^<>|\n]{1,48}\|>"  # Qwen, Llama 3, Phi, GLM: <|im_end|>, <|eot_id|>, ...
    r"|<｜[^<>｜\n]{1,48}｜>"  # DeepSeek writes full-width bars
    rf"|</?(?:{_NAMED_TOKENS})/?>"
    r"|\[/?(?:INST|IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT|CLS|SEP|PAD|UNK|MASK|BOS|EOS)\]"
    r"|<</?SYS>>)"
)
_SPECIAL_TOKEN = re.compile(_TOKEN)
_LEADING_TOKENS = re.compile(
    # Tokens that open a turn are followed by the speaker's name.
    rf"(?:\s*(?:(?:<\|(?:im_start|start_header_id|start)\|>|<start_of_turn>)"
    rf"\s*(?:assistant|model|gpt)\b|{_TOKEN}))+\s*"
)
# The first of these after the reply's text ends it: what follows is another turn, which a server
# with the right stop tokens would not have generated.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|eot|end|endoftext|end_of_text|end_of_sentence|eos|"
    r"return|user|assistant|system|observation|start_header_id|end_header_id|start|call)\|>"
    r"|<｜[^<>｜\n]{0,24}(?:end|User|Assistant)[^<>｜\n]{0,24}｜>"
    r"|</s>|<eos>|<eot>|<eod>|<eom>|<s>|<end_of_turn>|<start_of_turn>|<end_of_utterance>"
    r"|<end_of_text>|<endoftext>|<im_end>|<im_start>|\[/?INST\]|\[EOS\]"
)
_TRAILING_TOKENS = re.compile(rf"(?:\s*{_TOKEN})+\s*\Z")


def final_text(reply: str) -> str:
    r"""Returns the text that a reply means to say.

    Reasoning in tags is cut off, also where the chat template has swallowed the opening tag.
    Tokens of the chat template are cut off at both ends, and the text ends with its turn.

    Args:
        reply: As the model generated it.

    Raises:
        ReplyError: If nothing but reasoning is there, or the reply is longer than any caption.

    Example:
        >>> final_text("Let me look again.</think>\nCrowded glands.<|im_end|>")
        'Crowded glands.'
        >>> final_text("<image>\nLoose stroma.")
        'Loose stroma.'
    """
    text = strip_reasoning(reply)
    answers = list(_ANSWER_OPEN.finditer(text))
    text = _ANSWER_CLOSE.split(text[answers[-1].end() if answers else 0 :], maxsplit=1)[0]
    if leading := _LEADING_TOKENS.match(text):
        text = text[leading.end() :]
    if ended := _END_OF_TURN.search(text):
        text = text[: ended.start()]
    return _TRAILING_TOKENS.sub("", text).strip()


def strip_reasoning(reply: str) -> str:
    """Returns a reply without the reasoning in tags, chat template tokens included.

    Raises:
        ReplyError: If nothing but reasoning is there, or the reply is longer than any caption.
    """
    if len(reply) > MAX_REPLY_CHARS:
        raise ReplyError(f"the reply has {len(reply):,} characters")
    text = reply
    channels = [*_FINAL_CHANNEL.finditer(text), *_FINAL_CHANNEL_BARE.finditer(text)]
    if channels:
        return text[channels[-1].end() :]
    if "<|channel|>" in text:
        raise ReplyError("the reply breaks off in the reasoning")
    before, closes = text, list(_REASONING_CLOSE.finditer(text))
    if closes:
        text = text[closes[-1].end() :]
        if not _SPECIAL_TOKEN.sub("", text).strip():
            # Some models justify themselves after the answer. An opening tag that the template
            # has swallowed leaves only reasoning before the closing one.
            opening = _REASONING_OPEN.search(before)
            text = before[: opening.start()] if opening else ""
            if not _SPECIAL_TOKEN.sub("", text).strip():
                raise ReplyError("the reply holds nothing but reasoning")
    if _REASONING_OPEN.search(text):
        raise ReplyError("the reply breaks off in the reasoning")
    return text


def find_markup(text: str) -> str | None:
    """Returns the first special token or reasoning tag in a text, or None.

    Example:
        >>> find_markup("Loose stroma.<|im_end|>"), find_markup("Nuclei < 8 µm")
        ('<|im_end|>', None)
    """
    found = [
        match
        for pattern in (_SPECIAL_TOKEN, _REASONING_OPEN, _REASONING_CLOSE)
        if (match := pattern.search(text))
    ]
    return min(found, key=lambda match: match.start())[0] if found else None


_OBJECT_START = re.compile(r"\{\s*[\"'“]")


def last_json_object(text: str) -> Any:
    """Returns the last JSON object of a reply; words, fences and drafts may stand before it.

    Models that correct themselves write the valid object last. Tokens that end the turn are looked
    for between objects only, since the texts inside may end with one, too.

    Raises:
        ReplyError: If there is none, or a later one breaks off: its draft must not replace it.

    Example:
        >>> last_json_object('{"usable": false} On reflection: {"usable": true}')
        {'usable': True}
    """
    decoder, found, end = json.JSONDecoder(parse_constant=_no_constant), None, 0
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
            if ended := _END_OF_TURN.search(text, end, text.find("{", end) + 1 or len(text)):
                text = text[: ended.start()]
            start = text.find("{", end)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    if found is None:
        raise ReplyError("the reply holds no JSON object")
    if _OBJECT_START.search(text, end):
        raise ReplyError("the last JSON object of the reply is incomplete or malformed")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

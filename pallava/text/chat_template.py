"""Chat templates of tokenizers: converted from XTuner's prompt templates, or the tokenizer's own.

A chat template may render today's date and, unless told otherwise, let the model think before it
answers. `pinned` removes both, so that training, inference and export render the same text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pallava.text.templates import PROMPT_TEMPLATES, PromptTemplate

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""Date in the prompts of models whose chat template writes one; the default of Llama 3.1's."""

_NO_THINKING = "{%- set enable_thinking = false -%}"
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def chat_template(template: Mapping[str, Any]) -> str:
    """Builds the Jinja template that renders the same text as training.

    Images of a message come first, each followed by a newline, as XTuner's `llava_map_fn` places
    them. As in XTuner's templates, a question ends with the text that introduces the answer. The
    template does not include a BOS token.

    Args:
        template: Entry of `xtuner.utils.PROMPT_TEMPLATE`: `INSTRUCTION`, and optionally `SYSTEM`,
            `SUFFIX` and `SEP`.

    Raises:
        ValueError: If `INSTRUCTION` is missing or contains no `{input}`.
    """
    instruction = str(template.get("INSTRUCTION") or "")
    if instruction.count("{input}") != 1:
        raise ValueError(
            f"prompt template: expected INSTRUCTION with one {{input}}: {instruction!r}"
        )
    system = _fill_template(str(template.get("SYSTEM") or ""), {"{system}": "text.value"})
    question = _fill_template(instruction, {"{input}": "text.value", "{round}": "state.round"})
    suffix, sep = str(template.get("SUFFIX") or ""), str(template.get("SEP") or "")
    return (
        "{%- set state = namespace(round=0) -%}"
        "{%- for message in messages -%}"
        "{%- set text = namespace(value='') -%}"
        "{%- if message['content'] is string -%}"
        "{%- set text.value = message['content'] -%}"
        "{%- else -%}"
        "{%- for part in message['content'] if part['type'] == 'image' -%}"
        "{%- set text.value = text.value + '<image>\\n' -%}"
        "{%- endfor -%}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}"
        "{%- set text.value = text.value + part['text'] -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{system}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- set state.round = state.round + 1 -%}"
        f"{question}"
        "{%- else -%}"
        f"{{{{- text.value + {_literal(suffix)} -}}}}"
        f"{{%- if not loop.last -%}}{{{{- {_literal(sep)} -}}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


@functools.lru_cache(maxsize=16)
def known_template(jinja: str | None) -> PromptTemplate | None:
    """Returns the prompt template that `chat_template` converted to `jinja`; None if there is none.

    With it, conversations are encoded piece by piece exactly as in training, rather than as
    rendered text.
    """
    for template in PROMPT_TEMPLATES.values():
        if chat_template(template.fields()) == jinja:
            return template
    return None


def pinned(jinja: str) -> str:
    """Fixes what a chat template would otherwise take from outside: the date, and thinking to off.

    The result renders the same text on any day and without arguments. Applied twice, it changes
    nothing.

    Example:
        >>> pinned("{{ strftime_now('%d %b %Y') }}").removeprefix(_NO_THINKING)
        '{{ "26 Jul 2024" }}'
    """
    fixed = _CLOCK.sub(lambda call: _literal(TEMPLATE_DATE.strftime(call[2])), jinja)
    mentions_thinking = "enable_thinking" in fixed and not fixed.startswith(_NO_THINKING)
    return _NO_THINKING + fixed if mentions_thinking else fixed


def template_of_tokenizer(tokenizer: Any) -> PromptTemplate:
    """Returns the prompt template of a tokenizer's own chat template, which is pinned.

    It has no stop words if the template does not end answers with a token.

    Raises:
        ValueError: If the tokenizer carries no chat template.
    """
    jinja = getattr(tokenizer, "chat_template", None)
    if not isinstance(jinja, str) or not jinja:
        raise ValueError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')}: carries no chat template; name "
            "a prompt template, such as llama3_chat"
        )
    if (known := known_template(jinja)) is not None:
        return known
    template = PromptTemplate("", chat_template=pinned(jinja))
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    try:
        answer = render_pieces(tokenizer, template, turns)[1]
    except ValueError:
        return template
    return replace(template, stop_words=(answer.strip()[1:].strip(),))


def render_chat(
    tokenizer: Any, template: PromptTemplate, messages: Sequence[Mapping[str, str]]
) -> str:
    """Renders a conversation with a chat template, up to where the next answer begins.

    Args:
        tokenizer: Tokenizer of the language model.
        template: Template with `chat_template`.
        messages: `{"role": ..., "content": ...}`; if the last is a question, the text that
            introduces its answer is appended.

    Raises:
        ValueError: If the template cannot express the conversation.
    """
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                chat_template=template.chat_template,
                tokenize=False,
                add_generation_prompt=messages[-1]["role"] == "user",
            )
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def render_pieces(
    tokenizer: Any, template: PromptTemplate, messages: Sequence[Mapping[str, str]]
) -> list[str]:
    """Renders a conversation for training, cut where answers begin and end; see `render_chat`.

    Returns:
        Pieces whose concatenation is the rendered conversation. Those with odd index are answers,
        each with the token that ends it.

    Raises:
        ValueError: If the template cannot express the conversation, or changes its answers.
    """
    whole = render_chat(tokenizer, template, messages)
    pieces, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Some templates render the prompt of an earlier answer differently afterwards: without the
        # empty thoughts of Qwen3, for instance. The answer then begins where the texts part.
        prompt = render_chat(tokenizer, template, messages[:number])
        start = _common_length(prompt, whole)
        text = message["content"].strip()
        end = whole.find(text, max(start, done))
        if end < 0 or whole[start:end].strip():
            raise ValueError(f"the chat template changes the answer {text!r:.80}")
        end = _end_of_turn(tokenizer, whole, end + len(text))
        pieces += [whole[done:start], whole[start:end]]
        done = end
    return [*pieces, whole[done:]]


def _end_of_turn(tokenizer: Any, text: str, end: int) -> int:
    """Returns the position after the token that ends an answer whose text ends at `end`."""
    rest = text[end:]
    blank = len(rest) - len(rest.lstrip())
    ends = [word for word in tokenizer.get_added_vocab() if rest[blank:].startswith(word)]
    if not ends:
        raise ValueError(f"the chat template ends answers with {rest[:20]!r}, which is no token")
    return end + blank + max(map(len, ends))


def _common_length(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _fill_template(pattern: str, variables: Mapping[str, str]) -> str:
    """Converts `a{input}b` to a Jinja expression that concatenates literals and variables."""
    pieces = [pattern.replace("{bot_name}", "BOT")]
    for mark in variables:
        pieces = [part for piece in pieces for part in _cut(piece, mark)]
    joined = " ~ ".join(variables.get(piece) or _literal(piece) for piece in pieces if piece)
    return f"{{{{- {joined} -}}}}" if joined else ""


def _cut(text: str, mark: str) -> list[str]:
    before, found, after = text.partition(mark)
    return [before, mark, after] if found else [text]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

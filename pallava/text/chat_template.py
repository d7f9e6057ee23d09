"""Converts XTuner's prompt templates to the Jinja chat templates of tokenizers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from pallava.text.templates import PROMPT_TEMPLATES, PromptTemplate


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

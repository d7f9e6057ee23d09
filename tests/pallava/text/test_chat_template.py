from __future__ import annotations

from typing import Any

import pytest
from xtuner.utils import PROMPT_TEMPLATE

from pallava.text.chat_template import chat_template
from tests.pallava.goldens import tokenizer


def render(name: str, messages: list[dict[str, Any]]) -> str:
    return tokenizer().apply_chat_template(
        messages, chat_template=chat_template(PROMPT_TEMPLATE[name]), tokenize=False
    )


def as_xtuner(name: str, system: str, turns: list[tuple[str, str]]) -> str:
    """What `xtuner.dataset.map_fns.template_map_fn` makes of a conversation."""
    template, text = PROMPT_TEMPLATE[name], ""
    if system:
        text += template.SYSTEM.format(system=system)
    for index, (question, answer) in enumerate(turns):
        text += template.INSTRUCTION.format(input=question, round=index + 1)
        if answer:
            text += answer + template.get("SUFFIX", "")
            text += template.get("SEP", "") if index < len(turns) - 1 else ""
    return text


@pytest.mark.parametrize(
    "name", ["llama3_chat", "vicuna", "internlm2_chat", "phi3_chat", "baichuan_chat"]
)
@pytest.mark.parametrize("system", ["", "You are a {pathologist}."])
def test_equals_xtuners_templates(name: str, system: str) -> None:
    turns = [('Is it "red"?\n{{ x }}', "yes"), ("Why?", "")]
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    assert render(name, messages) == as_xtuner(name, system, turns)


def test_images_come_first() -> None:
    content = [{"type": "text", "text": "Is it red?"}, {"type": "image"}]
    expected = PROMPT_TEMPLATE.llama3_chat.INSTRUCTION.format(input="<image>\nIs it red?")
    assert render("llama3_chat", [{"role": "user", "content": content}]) == expected


def test_without_a_place_for_the_question() -> None:
    with pytest.raises(ValueError, match="INSTRUCTION"):
        chat_template({"SYSTEM": "x"})

"""Prompt templates of instruction-tuned language models, under XTuner's names.

The formats are those with which the models were tuned, and equal XTuner's `PROMPT_TEMPLATE`
(github.com/InternLM/xtuner, `xtuner/utils/templates.py`), so that evaluation prompts match
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pathcore.names import did_you_mean

TOKENIZER_TEMPLATE = "tokenizer"
"""Name that selects the tokenizer's own chat template."""


UNNAMED = "unnamed"
"""Name of a format that is not in `PROMPT_TEMPLATES`, such as one from a user's config."""


@dataclass(frozen=True)
class PromptTemplate:
    """Format of a conversation.

    Attributes:
        instruction: Question with `{input}` and optionally `{round}`; ends where the answer begins.
        stop_words: Strings that end an answer, in addition to the tokenizer's EOS.
        system: Text before the first question, with `{system}`; None if the format has none.
        suffix: Text after an answer that is part of the answer.
        sep: Text between an answer and the next question.
        ends_with_suffix: Whether the suffix ends the answer. Otherwise EOS follows it, and the next
            question begins with another BOS.
        chat_template: Jinja chat template of a tokenizer, which then replaces all other fields but
            the stop words; see `pallava.text.chat_template.template_of_tokenizer`.
    """

    instruction: str
    stop_words: tuple[str, ...] = ()
    system: str | None = None
    suffix: str = ""
    sep: str = ""
    ends_with_suffix: bool = False
    chat_template: str | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> PromptTemplate:
        """Reads a template in XTuner's form: `INSTRUCTION`, `SYSTEM`, `SUFFIX`, `SEP`, ..."""
        return cls(
            instruction=str(fields.get("INSTRUCTION") or "{input}"),
            stop_words=tuple(map(str, fields.get("STOP_WORDS") or ())),
            system=fields.get("SYSTEM"),
            suffix=str(fields.get("SUFFIX") or ""),
            sep=str(fields.get("SEP") or ""),
            ends_with_suffix=bool(fields.get("SUFFIX_AS_EOS", False)),
            chat_template=fields.get("CHAT_TEMPLATE"),
        )

    def fields(self) -> dict[str, Any]:
        """Returns the template in XTuner's form, without keys for absent parts."""
        fields: dict[str, Any] = {"INSTRUCTION": self.instruction}
        if self.system is not None:
            fields["SYSTEM"] = self.system
        if self.suffix:
            fields["SUFFIX"] = self.suffix
        if self.ends_with_suffix:
            fields["SUFFIX_AS_EOS"] = True
        if self.sep:
            fields["SEP"] = self.sep
        if self.stop_words:
            fields["STOP_WORDS"] = list(self.stop_words)
        if self.chat_template is not None:
            fields["CHAT_TEMPLATE"] = self.chat_template
        return fields

    @property
    def name(self) -> str:
        """XTuner's name of this format, `tokenizer` for a chat template, or `unnamed`."""
        if self.chat_template is not None:
            return TOKENIZER_TEMPLATE
        # Exact matches first: internlm2_chat and qwen_chat differ only in their stop words.
        exact = [name for name, other in PROMPT_TEMPLATES.items() if self == other]
        alike = [name for name, other in PROMPT_TEMPLATES.items() if self.same_text(other)]
        return next(iter(exact + alike), UNNAMED)

    def same_text(self, other: PromptTemplate) -> bool:
        """Returns whether both templates render conversations identically, stop words aside."""
        return replace(self, stop_words=()) == replace(other, stop_words=())

    def render(self, question: str, system: str = "", turn: int = 1) -> str:
        """Renders a question.

        Args:
            question: Question text.
            system: System text, placed in front of the question.
            turn: Number of the question in the conversation, from 1.

        Raises:
            ValueError: If a system text is given but the format has no position for it.

        Example:
            >>> find_template("vicuna").render("Is there necrosis?")
            'USER: Is there necrosis? ASSISTANT:'
        """
        text = self.instruction.replace("{round}", str(turn)).replace("{input}", question)
        if not system:
            return text
        if self.system is None:
            raise ValueError("this prompt template has no place for a system text")
        return self.system.replace("{system}", system) + text


_QWEN = PromptTemplate(
    "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    stop_words=("<|im_end|>", "<|endoftext|>"),
    system="<|im_start|>system\n{system}<|im_end|>\n",
    suffix="<|im_end|>",
    sep="\n",
    ends_with_suffix=True,
)
_VICUNA = PromptTemplate(
    "USER: {input} ASSISTANT:",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. {system}\n "
    ),
    sep="\n",
)
_DEEPSEEK_CODER = PromptTemplate(
    "### Instruction:\n{input}\n### Response:\n",
    system=(
        "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by "
        "DeepSeekCompany, and you only answer questions related to computer science. For "
        "politically sensitive questions, security and privacy issues, and other non-computer "
        "science questions, you will refuse to answer. {system}\n"
    ),
    sep="\n",
)
_MISTRAL = PromptTemplate(
    "[INST] {input} [/INST]",
    system="[INST] {system} [/INST]\n",
    sep="\n",
)

# If several names share a format, `PromptTemplate.name` returns the first.
PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "default": PromptTemplate(
        "<|User|>:{input}\n<|Bot|>:",
        system="<|System|>:{system}\n",
        sep="\n",
    ),
    "zephyr": PromptTemplate(
        "<|user|>\n{input}\n<|assistant|>\n",
        system="<|system|>\n{system}\n",
        sep="\n",
    ),
    "internlm_chat": PromptTemplate(
        "<|User|>:{input}<eoh>\n<|Bot|>:",
        stop_words=("<eoa>",),
        system="<|System|>:{system}\n",
        suffix="<eoa>",
        sep="\n",
        ends_with_suffix=True,
    ),
    "internlm2_chat": PromptTemplate(
        "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        stop_words=("<|im_end|>",),
        system="<|im_start|>system\n{system}<|im_end|>\n",
        suffix="<|im_end|>",
        sep="\n",
        ends_with_suffix=True,
    ),
    "moss_sft": PromptTemplate(
        "<|Human|>: {input}<eoh>\n",
        stop_words=("<eoc>", "<eom>"),
        system="{system}\n",
        sep="\n",
    ),
    "llama2_chat": PromptTemplate(
        "[INST] {input} [/INST]",
        system=(
            "[INST] <<SYS>>\n You are a helpful, respectful and honest assistant. Always "
            "answer as helpfully as possible, while being safe. Your answers should not "
            "include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
            "content. Please ensure that your responses are socially unbiased and positive in "
            "nature.\n{system}\n<</SYS>>\n [/INST] "
        ),
        sep="\n",
    ),
    "code_llama_chat": PromptTemplate(
        "[INST] {input} [/INST]",
        system="{system}\n",
    ),
    "chatglm2": PromptTemplate(
        "[Round {round}]\n\n问：{input}\n\n答：",
        system="{system}\n",
        sep="\n\n",
    ),
    "chatglm3": PromptTemplate(
        "<|user|>\n{input}<|assistant|>\n",
        system="<|system|>\n{system}",
        sep="\n",
    ),
    "qwen_chat": _QWEN,
    "baichuan_chat": PromptTemplate(
        "<reserved_102>{input}<reserved_103>",
        system="{system}\n",
        sep="\n",
    ),
    "baichuan2_chat": PromptTemplate(
        "<reserved_106>{input}<reserved_107>",
        system="{system}\n",
        sep="\n",
    ),
    "vicuna": _VICUNA,
    "wizardlm": _VICUNA,
    "wizardcoder": PromptTemplate(
        "### Instruction:\n{input}\n\n### Response:",
        system=(
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n{system}\n "
        ),
        sep="\n\n",
    ),
    "deepseek_coder": _DEEPSEEK_CODER,
    "deepseekcoder": _DEEPSEEK_CODER,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "deepseek_moe": _MISTRAL,
    "deepseek_v2": PromptTemplate(
        "User: {input}\n\nAssistant: ",
        stop_words=("<｜end▁of▁sentence｜>",),
        system="{system}\n\n",
        suffix="<｜end▁of▁sentence｜>",
        ends_with_suffix=True,
    ),
    "minicpm": PromptTemplate(
        "<用户> {input} <AI>",
        sep="\n",
    ),
    "minicpm3": _QWEN,
    "gemma": PromptTemplate(
        "<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
        stop_words=("<end_of_turn>",),
        system="<start_of_turn>system\n{system}<end_of_turn>\n",
        suffix="<end_of_turn>",
        sep="\n",
    ),
    "cohere_chat": PromptTemplate(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{input}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        stop_words=("<|END_OF_TURN_TOKEN|>",),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>",
        suffix="<|END_OF_TURN_TOKEN|>",
        ends_with_suffix=True,
    ),
    "llama3_chat": PromptTemplate(
        "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop_words=("<|eot_id|>",),
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        suffix="<|eot_id|>",
        ends_with_suffix=True,
    ),
    "phi3_chat": PromptTemplate(
        "<|user|>\n{input}<|end|>\n<|assistant|>\n",
        stop_words=("<|end|>",),
        system="<|system|>\n{system}<|end|>\n",
        suffix="<|end|>",
        sep="\n",
        ends_with_suffix=True,
    ),
}


def find_template(name: str) -> PromptTemplate:
    """Returns a template by XTuner's name.

    Raises:
        ValueError: If the name is unknown. The message suggests similar ones.
    """
    if name not in PROMPT_TEMPLATES:
        raise ValueError(
            f"prompt template {name!r}: expected one of XTuner's, or {TOKENIZER_TEMPLATE!r} for "
            f"the one that the tokenizer carries{did_you_mean(name, PROMPT_TEMPLATES)}"
        )
    return PROMPT_TEMPLATES[name]

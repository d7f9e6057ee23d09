"""Prompts in which benchmarks put their questions to a model, by name.

A published score belongs to its prompt: the closed part of one benchmark moves by ten points with
the wording alone. A question therefore keeps its stem and its options apart from the text that is
sent, and the same question can be asked in the wording of each paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pathcore.names import did_you_mean

QUESTION, OPTIONS = "{question}", "{options}"
DEFAULT_PROMPT = "letter"
PUBLISHED_PROMPT = "published"
"""Name for the wording that a data set itself ships, in sets that do."""


@dataclass(frozen=True)
class Prompt:
    """How open, closed and multiple-choice questions are worded.

    Attributes:
        name: Name in reports; part of the settings of a run.
        choice: Template of multiple choice, with `{question}` and `{options}`.
        option: Template of one option, with `{letter}` and `{text}`; options are separate lines.
        open: Template of open questions, with `{question}`.
        closed: Template of yes/no questions, with `{question}`.

    Raises:
        ValueError: If a template lacks a placeholder.

    Example:
        >>> print(PROMPTS["letter"].render("Which organ?", {"A": "liver", "B": "lung"}, "choice"))
        Which organ?
        A: liver
        B: lung
        Answer with the letter of the correct option.
    """

    name: str
    choice: str
    option: str = "{letter}: {text}"
    open: str = QUESTION
    closed: str = QUESTION

    def __post_init__(self) -> None:
        needed = (
            (self.choice, (QUESTION, OPTIONS)),
            (self.option, ("{letter}", "{text}")),
            (self.open, (QUESTION,)),
            (self.closed, (QUESTION,)),
        )
        for template, placeholders in needed:
            if any(placeholder not in template for placeholder in placeholders):
                raise ValueError(
                    f"prompt {template!r}: expected {' and '.join(placeholders)} in it"
                )

    def render(self, stem: str, options: Mapping[str, str], answer_type: str) -> str:
        """Returns the text to send.

        Args:
            stem: Question without options.
            options: Option text by letter; only used for multiple choice.
            answer_type: `choice`, `yes/no` or any other type, which is open.
        """
        # str.format would fail on questions that contain braces.
        if answer_type == "choice":
            lines = (
                self.option.replace("{letter}", letter).replace("{text}", text)
                for letter, text in options.items()
            )
            return self.choice.replace(OPTIONS, "\n".join(lines)).replace(QUESTION, stem)
        return (self.closed if answer_type == "yes/no" else self.open).replace(QUESTION, stem)


_PATHMMU_OPTION = "({letter}) {text}"

PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(
            DEFAULT_PROMPT, "{question}\n{options}\nAnswer with the letter of the correct option."
        ),
        # PathMMU words its questions by model family (eval/configs of its repository).
        Prompt(
            "pathmmu-llava",
            "{question}\n{options}\n\n"
            "Answer with the option's letter from the given choices directly.",
            _PATHMMU_OPTION,
        ),
        Prompt("pathmmu-qwen-vl", "{question}\n{options}\n\nAnswer:", _PATHMMU_OPTION),
        Prompt(
            "pathmmu-blip2", "Question: {question}\nOptions: {options}\n\nAnswer:", _PATHMMU_OPTION
        ),
        Prompt(
            "pathmmu-instructblip",
            "Choose the correct option to the following question: {question} Options: {options}\n"
            " Answer:",
            _PATHMMU_OPTION,
        ),
        # LLaVA-Med and Quilt-LLaVA name the two answers of PathVQA's closed questions.
        Prompt(
            "llava-med",
            "{question}\n{options}\nAnswer with the letter of the correct option.",
            closed="{question} Please choose from the following two options: [yes, no]",
        ),
        Prompt(
            "short",
            "{question}\n{options}\nAnswer with the letter of the correct option.",
            open="{question}\nAnswer with a single word or phrase.",
            closed="{question}\nAnswer with a single word, yes or no.",
        ),
        Prompt("slidechat", "{question}\n{options}", "{letter}. {text}"),
    )
}


def find_prompt(name: str) -> Prompt:
    """Returns a prompt by name, or the prompt of a template with `{question}` and `{options}`.

    Raises:
        ValueError: If it is neither.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    if QUESTION not in name:
        raise ValueError(
            f"prompt {name!r}: neither a known name nor a template with {{question}} and "
            f"{{options}} in it{did_you_mean(name, PROMPTS)}"
        )
    return Prompt("custom", name)

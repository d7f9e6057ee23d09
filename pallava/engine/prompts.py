"""Determines the prompt template of a training config by calling the functions that training calls.

A config can name a template in several fields: a variable `prompt_template`, the chat hook, and the
dataset's `template_map_fn`. Only the last one affects the tokens that the model is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pallava.engine.conversations import TokenizerTemplate, build
from pallava.text.chat_template import template_of_tokenizer
from pallava.text.templates import PROMPT_TEMPLATES, TOKENIZER_TEMPLATE, PromptTemplate

NO_TEMPLATE = PromptTemplate("{input}")
"""Template of a dataset without `template_map_fn`: the bare question."""

TOKENISED_REPORT = "tokenised.json"
"""Record of `xtuner-add tokenise` in a folder of tokenized rows."""

_QUESTIONS = ("QUESTION-ONE-OF-TWO", "QUESTION-TWO-OF-TWO")
_ANSWER, _SYSTEM = "ANSWER-TO-IT", "SYSTEM-TEXT"


def trained_template(cfg: Mapping[str, Any]) -> PromptTemplate:
    """Returns the prompt template of a config's training data.

    Rows tokenized in advance by `xtuner-add tokenise` record their template in the folder. It takes
    precedence over `template_map_fn`, which such a dataset never calls.

    Args:
        cfg: Training config. If it has several datasets, they must agree.

    Raises:
        ValueError: If the datasets use different templates, or a `template_map_fn` cannot be
            expressed as a template.
    """
    found = {where: template_of_dataset(dataset) for where, dataset in training_datasets(cfg)}
    templates = list(found.values())
    if not templates:
        return NO_TEMPLATE
    for where, template in found.items():
        if not template.same_text(templates[0]):
            raise ValueError(
                f"{where} uses the prompt template {template.name!r}, {next(iter(found))} uses "
                f"{templates[0].name!r}; one model can be asked in one template only: give all "
                "data sets the same"
            )
    return templates[0]


def disagreeing_templates(cfg: Mapping[str, Any], trained: PromptTemplate) -> list[str]:
    """Lists the fields of a config that name a template other than that of the training data."""
    named = {"prompt_template": cfg.get("prompt_template")}
    for index, hook in enumerate(cfg.get("custom_hooks") or ()):
        if isinstance(hook, Mapping):
            named[f"custom_hooks[{index}].prompt_template"] = hook.get("prompt_template")
    return [
        f"{where} is {template.name!r}, but the training data uses {trained.name!r}"
        for where, value in named.items()
        if (template := _as_template(value)) is not None and not template.same_text(trained)
    ]


def template_of(map_fn: Callable[[dict[str, Any]], Mapping[str, Any]] | None) -> PromptTemplate:
    """Infers a template from what a function makes of two turns with known texts.

    Args:
        map_fn: Built `template_map_fn`: maps a row with `conversation` to the row with the template
            applied.

    Raises:
        ValueError: If the result is not question and answer within fixed texts.

    Example:
        >>> from functools import partial
        >>> from xtuner.dataset.map_fns import template_map_fn
        >>> from xtuner.utils import PROMPT_TEMPLATE
        >>> template_of(partial(template_map_fn, template=PROMPT_TEMPLATE.qwen_chat)).suffix
        '<|im_end|>'
    """
    if map_fn is None:
        return NO_TEMPLATE
    if isinstance(map_fn, TokenizerTemplate):
        return map_fn.template
    turns = [{"input": question, "output": _ANSWER} for question in _QUESTIONS]
    first, second = map_fn({"conversation": turns})["conversation"]
    before, question, after = first["input"].partition(_QUESTIONS[0])
    answer, _, suffix = first["output"].partition(_ANSWER)
    again = second["input"].replace(_QUESTIONS[1], _QUESTIONS[0])
    instruction = f"{before}{{input}}{after}"
    if again != first["input"]:
        instruction = instruction.replace("1", "{round}")
    rendered = PromptTemplate(instruction).render(_QUESTIONS[1], turn=2)
    if not question or answer or rendered != second["input"]:
        raise ValueError(
            "template_map_fn: cannot be written as a prompt template (fixed text, question, fixed "
            f"text); it made {first['input']!r} and {second['input']!r} of two questions"
        )
    template = PromptTemplate(
        instruction,
        system=_system_of(map_fn, first["input"]),
        suffix=suffix,
        sep=first.get("sep") or "",
        ends_with_suffix=not first.get("need_eos_token", True),
    )
    stated = getattr(map_fn, "keywords", {}).get("template") or {}
    known = PROMPT_TEMPLATES.get(template.name)
    stops = stated.get("STOP_WORDS") or (known.stop_words if known else ())
    return PromptTemplate.from_fields(template.fields() | {"STOP_WORDS": list(stops)})


def _system_of(map_fn: Callable[[dict[str, Any]], Any], question: str) -> str | None:
    turn = {"input": _QUESTIONS[0], "output": _ANSWER, "system": _SYSTEM}
    try:
        text = map_fn({"conversation": [turn]})["conversation"][0]["input"]
    except (AttributeError, KeyError):  # XTuner reads template.SYSTEM, which some templates lack
        return None
    if _SYSTEM not in text or not text.endswith(question):
        return None
    return str(text[: -len(question)].replace(_SYSTEM, "{system}"))


def template_of_dataset(dataset: Mapping[str, Any]) -> PromptTemplate:
    """Returns the prompt template of one dataset, given as its config."""
    folder = dataset.get("offline_processed_text_folder")
    report = Path(folder) / TOKENISED_REPORT if folder else None
    if report is not None and report.is_file():
        recorded = json.loads(report.read_bytes()).get("prompt_template")
        if recorded is not None:
            return PromptTemplate.from_fields(recorded)
    if dataset.get("template_map_fn") == TOKENIZER_TEMPLATE:
        return template_of_tokenizer(build(dataset["tokenizer"]))
    return template_of(build(dataset.get("template_map_fn")))


def training_datasets(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields place and config of each training dataset, also of those in a ConcatDataset."""
    waiting = [("train_dataloader.dataset", (cfg.get("train_dataloader") or {}).get("dataset"))]
    while waiting:
        where, dataset = waiting.pop(0)
        if not isinstance(dataset, Mapping):
            continue
        parts = dataset.get("datasets")
        if isinstance(parts, list | tuple):
            waiting += [(f"{where}.datasets[{i}]", part) for i, part in enumerate(parts)]
        elif isinstance(dataset.get("dataset"), Mapping):  # a wrapper, such as RepeatDataset
            waiting.append((f"{where}.dataset", dataset["dataset"]))
        else:
            yield where, dataset


def _as_template(value: Any) -> PromptTemplate | None:
    if isinstance(value, str):  # a new-style config may hold `xtuner.utils.PROMPT_TEMPLATE.NAME`
        return PROMPT_TEMPLATES.get(value.rpartition(".")[2])
    if isinstance(value, Mapping) and value.get("INSTRUCTION"):
        return PromptTemplate.from_fields(value)
    return None

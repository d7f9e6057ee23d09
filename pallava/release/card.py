"""Writes the model card of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallava.modeling.qformer import ConnectorConfig
from pallava.modeling.slide_tokens import SlideTokenConfig
from pallava.release.pth_to_hf import Recipe

_PAPER = "https://doi.org/10.1109/BIBM62325.2024.10821785"

_IMAGE_USE = (
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "",
    "model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)",
    "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
    'content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]',
    'messages = [{"role": "user", "content": content}]',
    "prompt = processor.apply_chat_template(messages, tokenize=False)",
    "inputs = processor(images=[image], text=[prompt])",
    "ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
    'print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:],',
    "                             skip_special_tokens=True))",
)
_SLIDE_USE = (
    "from pallava import load_model",
    "",
    "model = load_model(folder)",
    'print(model.answer("features/slide.h5", "Is there necrosis?"))',
)


def write_card(
    file: Path,
    recipe: Recipe,
    connector: ConnectorConfig,
    scores: dict[str, Any],
    audits: dict[str, dict[str, str]] | None = None,
) -> None:
    """Writes README.md of an exported folder.

    Args:
        file: Output file.
        recipe: Settings of the training config.
        connector: Sizes and mode of the connector.
        scores: Metrics by benchmark, `{"PathVQA": {"closed accuracy": 0.9}}`. If empty, the card
            states that there are none.
        audits: Verdicts of audits, by benchmark and form of questions.
    """
    mode = (
        f"scale-invariant: {'map and tiles' if recipe.slide_tokens else 'thumbnail and sub-images'}"
        if connector.cross_attention
        else "released mode: the thumbnail alone"
    )
    subject = "slides" if recipe.slide_tokens else "images"
    lines = [
        "---",
        f"library_name: {'pallava' if recipe.slide_tokens else 'transformers'}",
        "pipeline_tag: image-text-to-text",
        "license: other",
        "license_name: base-model-licence-research-only",
        f"base_model: {Path(recipe.base_model).name if _is_path(recipe) else recipe.base_model}",
        "tags: [pathology, histology, pallava]",
        "---",
        "",
        "# PA-LLaVA",
        "",
        f"A vision-language model for human pathology {subject} ([paper]({_PAPER})).",
        "",
        "## Intended use",
        "",
        "Research only. Not a medical device; not for diagnosis, treatment or any decision about a "
        "patient. Answers can be wrong and sound certain.",
        "",
        "## Model",
        "",
        f"- Language model: {recipe.base_model}, LoRA "
        f"(rank {recipe.lora.get('r')}, alpha {recipe.lora.get('lora_alpha')}) merged in",
        f"- {_encoder(recipe)}",
        f"- Connector: {connector.num_hidden_layers} layers, {mode}",
        "",
        "## Data and recipe",
        "",
        *_rows(recipe.training),
        "",
        "## Scores",
        "",
        *_scores(scores),
        "",
        *_audits(audits or {}),
        "## Licence",
        "",
        "The weights contain the base model's and are bound by its licence, which is beside this "
        "file where the base model's folder had one, and by the terms of the training data.",
        "",
        "## Use",
        "",
        "```python",
        *(_SLIDE_USE if recipe.slide_tokens else _IMAGE_USE),
        "```",
        "",
    ]
    file.write_text("\n".join(lines), encoding="utf-8")


def _encoder(recipe: Recipe) -> str:
    if not recipe.slide_tokens:
        return f"Vision encoder: {recipe.visual_encoder}, hidden state {recipe.visual_select_layer}"
    slides = SlideTokenConfig(**recipe.slide_tokens)
    return f"Tile features: {slides.in_features} wide, of {slides.origin}"


def _is_path(recipe: Recipe) -> bool:
    return recipe.base_model.startswith(("/", ".")) or recipe.base_model.count("/") != 1


def _rows(values: dict[str, Any]) -> list[str]:
    rows = [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items() if value]
    return rows or ["The run left no record of its data and settings."]


def _scores(scores: dict[str, Any]) -> list[str]:
    if not scores:
        return ["Not evaluated."]
    lines = ["| benchmark | metric | value |", "|---|---|---|"]
    for benchmark, metrics in scores.items():
        for metric, value in metrics.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            lines.append(f"| {benchmark} | {metric} | {shown} |")
    return lines


def _audits(audits: dict[str, dict[str, str]]) -> list[str]:
    if not audits:
        return []
    lines = [
        "## Audit of the scores",
        "",
        "The same questions with exchanged images, without images, and in other words and orders; "
        "in brackets 95 % intervals.",
        "",
    ]
    for benchmark, sentences in audits.items():
        lines += [f"- {benchmark}, {form}: {sentence}" for form, sentence in sentences.items()]
    return [*lines, ""]

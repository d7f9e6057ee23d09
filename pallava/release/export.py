"""Exports encoder, connector and merged language model as one folder.

A model of images becomes a folder that transformers loads. A model of slides becomes a folder with
the merged language model, `projector/` and `visual_encoder/`, which `pallava.load_model` loads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pallava.folder_build import FolderBuild
from pallava.inference.loading import CONVERSION_NAME
from pallava.modeling.folders import load_connector, load_slide_encoder, load_vision_encoder
from pallava.modeling.hf import PALLaVAForConditionalGeneration
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ScaleInvariantConnector
from pallava.release.card import write_card
from pallava.release.merge import (
    LICENCE_FILES,
    TOKENIZER_FILES,
    Merger,
    copy_files,
    folder_identity,
    write_config,
    write_shards,
)
from pallava.release.pth_to_hf import Recipe, processor_config, read_conversion, with_chat_template
from pallava.release.remote_code import AUTO_MAP, travelling_files
from pallava.release.verify import verify_model
from pathcore.files import StrPath
from pathcore.weights import CheckpointError, read_state_dict

IMAGE_TOKEN = "<image>"


def export(
    base: StrPath,
    converted: StrPath,
    out: StrPath,
    *,
    layout: Literal["pallava", "llava"] = "pallava",
    device: str | None = None,
    scores: dict[str, Any] | None = None,
    audits: dict[str, dict[str, str]] | None = None,
    force_base: bool = False,
    probe: bool = True,
    progress: bool = True,
) -> dict[str, str]:
    """Writes one folder that `pallava.load_model` loads.

    `AutoModelForImageTextToText` and `AutoProcessor` load it too, unless it is a model of slides.
    The language model is merged during the export, tensor by tensor; every part keeps its dtype.

    Args:
        base: Folder of the language model used in training.
        converted: Folder written by `xtuner-add pth-to-hf`.
        out: Output folder; an interrupted export resumes in `OUT.partial`.
        layout: `pallava`, or `llava` for the LLaVA classes of transformers.
        device: `cpu` or `cuda`. Defaults to a GPU if there is one.
        scores: Metrics for the model card, by benchmark.
        audits: Verdicts of audits for the model card; see `pallava.release.card.write_card`.
        force_base: Whether to skip the check that the adapter was trained on `base`.
        probe: Whether to compare the merged language model with PEFT's on a few tokens.
        progress: Whether to show a progress bar.

    Returns:
        SHA-256 digest by file name.

    Raises:
        FileNotFoundError: If a folder does not exist.
        CheckpointError: If the parts do not fit each other, if the connector does not fit `layout`,
            or if the result differs from the trained model.
    """
    converted = Path(converted)
    recipe, _ = read_conversion(converted)
    if layout == "llava":
        refuse_llava(converted / "projector")
    adapter = converted / "llm_adapter"
    merger = Merger(base, [adapter] if adapter.is_dir() else [], device, force_base=force_base)
    if merger.base.model is None:
        raise CheckpointError(
            f"{base}: transformers does not know the architecture "
            f"{merger.base.config.get('model_type')!r} of this language model, or it is quantised; "
            "an exported model could not load it"
        )
    connector = load_connector(converted / "projector")
    encoder: Any = (load_slide_encoder if recipe.slide_tokens else load_vision_encoder)(
        converted / "visual_encoder"
    )
    _check_widths(merger, connector, encoder)
    parts = [converted, converted / "projector", converted / "visual_encoder"]
    inputs = {"operation": "export", "scores": scores, "audits": audits, **merger.identity()}
    inputs["parts"] = [folder_identity(part) for part in parts]
    inputs["code"] = sorted(travelling_files().items())
    with FolderBuild(out, inputs) as build:
        if not build.complete and recipe.slide_tokens:
            _write_slide_model(build, merger, converted, recipe, probe=probe, progress=progress)
            with build.file("README.md") as partial:
                write_card(partial, recipe, connector.config, scores or {}, audits)
        elif not build.complete:
            plan = merger.plan(untie=True)
            extra = _prefixed("visual_encoder.", encoder.state_dict())
            extra |= _prefixed("projector.", connector.state_dict())
            write_shards(merger, plan, build, prefix="llm.", extra=extra, progress=progress)
            image_token_id = _write_tokenizer(build, merger, converted, recipe)
            _write_small_files(build, merger, recipe, connector, encoder, scores, audits)
            text_config = merger.base.config | plan.config_changes | {"tie_word_embeddings": False}
            config = _config(text_config, recipe, connector, encoder)
            write_config(build, config | {"image_token_id": image_token_id})
            verify_model(
                merger.base,
                merger.adapters,
                build.folder,
                tied=False,
                probe=probe,
                model_class=PALLaVAForConditionalGeneration,
                prefix="llm.",
            )
        return build.finish()


def _write_slide_model(
    build: FolderBuild,
    merger: Merger,
    converted: Path,
    recipe: Recipe,
    *,
    probe: bool,
    progress: bool,
) -> None:
    """Writes the merged language model with its tokenizer, and the other parts in sub-folders."""
    plan = merger.plan()
    write_shards(merger, plan, build, progress=progress)
    has_own = (converted / "tokenizer_config.json").is_file()
    copy_files(converted if has_own else merger.base.folder, build, TOKENIZER_FILES)
    copy_files(merger.base.folder, build, ("generation_config.json", *LICENCE_FILES))
    for part in ("projector", "visual_encoder"):
        for name in ("config.json", "model.safetensors"):
            with build.file(f"{part}/{name}") as partial:
                shutil.copyfile(converted / part / name, partial)
    with build.file(CONVERSION_NAME) as partial:
        partial.write_text(_json({"prompt_template": recipe.prompt_template}))
    write_config(build, merger.base.config | plan.config_changes)
    verify_model(merger.base, merger.adapters, build.folder, tied=plan.is_tied, probe=probe)


def refuse_llava(projector: Path) -> None:
    """Explains why a connector cannot be exported to the stock LLaVA layout.

    `LlavaForConditionalGeneration` of transformers has a two-layer MLP between encoder and language
    model; it cannot represent a transformer stack over thumbnail and sub-images.

    Raises:
        CheckpointError: Always; the message depends on the connector.
    """
    names = set(read_state_dict(projector))
    if any(name.startswith("model.bert.") for name in names):
        raise CheckpointError(
            f"{projector}: the scale-invariant connector is a transformer stack; stock LLaVA holds "
            "a two-layer MLP and has no place for it. Export without --layout llava"
        )
    raise CheckpointError(
        f"{projector}: not a connector of this project; `xtuner convert pth_to_hf --save-format "
        "huggingface` writes stock LLaVA for XTuner's own MLP projector"
    )


def _config(
    text_config: dict[str, Any],
    recipe: Recipe,
    connector: ScaleInvariantConnector,
    encoder: PLIPVisionEncoder,
) -> dict[str, Any]:
    vision = {k: v for k, v in encoder.config.to_dict().items() if k != "transformers_version"}
    return {
        "model_type": "pallava",
        "architectures": ["PALLaVAForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "torch_dtype": text_config.get("torch_dtype") or text_config.get("dtype") or "float32",
        "text_config": text_config,
        "vision_config": vision,
        "connector_config": asdict(connector.config),
        "visual_select_layer": recipe.visual_select_layer,
        # The published mask depends on the other images of a training batch; answers must not.
        "sub_image_mask": "exact",
        "tie_word_embeddings": False,
    }


def _write_tokenizer(build: FolderBuild, merger: Merger, converted: Path, recipe: Recipe) -> int:
    """Writes the tokenizer with image token and chat template; returns the image token's id."""
    from transformers import AddedToken, AutoTokenizer

    has_own = (converted / "tokenizer_config.json").is_file()
    source = converted if has_own else merger.base.folder
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, normalized=False, special=True)]},
        replace_additional_special_tokens=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        if recipe.prompt_template:
            with_chat_template(folder, recipe.prompt_template)
        copy_files(folder, build, TOKENIZER_FILES)
    stops = [
        tokenizer.convert_tokens_to_ids(word)
        for word in recipe.prompt_template.get("STOP_WORDS", [])
        if word in tokenizer.get_vocab()
    ]
    with build.file("generation_config.json") as partial:
        partial.write_text(_json(_generation_config(merger.base.folder, tokenizer, stops)))
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _generation_config(base: Path, tokenizer: Any, stops: Sequence[int]) -> dict[str, Any]:
    file = base / "generation_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    eos = config.get("eos_token_id", tokenizer.eos_token_id)
    ids = eos if isinstance(eos, list) else [eos]
    ids = [token for token in dict.fromkeys([*ids, *stops]) if token is not None]
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else tokenizer.eos_token_id
    # Without the sampling and repetition penalty that chat models ship: answers are greedy, as they
    # were evaluated.
    return {
        "bos_token_id": config.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": ids,
        "pad_token_id": config.get("pad_token_id", pad),
    }


def _write_small_files(
    build: FolderBuild,
    merger: Merger,
    recipe: Recipe,
    connector: ScaleInvariantConnector,
    encoder: PLIPVisionEncoder,
    scores: dict[str, Any] | None,
    audits: dict[str, dict[str, str]] | None,
) -> None:
    copy_files(merger.base.folder, build, LICENCE_FILES)
    for name, source in travelling_files().items():
        with build.file(name) as partial:
            partial.write_text(source, encoding="utf-8")
    config = processor_config(recipe, connector.config, encoder.config.image_size)
    config["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    with build.file("processor_config.json") as partial:
        partial.write_text(_json(config))
    with build.file("README.md") as partial:
        write_card(partial, recipe, connector.config, scores or {}, audits)


def _check_widths(merger: Merger, connector: ScaleInvariantConnector, encoder: Any) -> None:
    # `hidden_size` would not do: OPT's embeddings may be narrower, and GPT-2 calls it `n_embd`.
    width = merger.base.info(str(merger.base.input_embeddings)).shape[1]
    pairs = (
        ("language model", width, connector.config.llm_hidden_size),
        ("encoder", encoder.config.hidden_size, connector.config.visual_hidden_size),
    )
    for what, found, expected in pairs:
        if found != expected:
            raise CheckpointError(
                f"the {what} is {found} wide, the connector was trained for {expected}"
            )


def _prefixed(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.clone(t.detach().cpu()) for name, t in state_dict.items()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

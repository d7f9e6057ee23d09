"""One folder: encoder, connector and merged language model as a Hugging Face model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pallava.folder_build import FolderBuild
from pallava.modeling.folders import load_connector, load_vision_encoder
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ScaleInvariantConnector
from pallava.release.card import write_card
from pallava.release.merge import copy_files, write_config, write_shards
from pallava.release.merge_plan import Merger, folder_identity
from pallava.release.pth_to_hf import Recipe, processor_config, read_conversion, with_chat_template
from pallava.release.remote_code import AUTO_MAP, travelling_files
from pathcore.weights import CheckpointError, read_state_dict

IMAGE_TOKEN = "<image>"
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "*.model",
)
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def export(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: Literal["pallava", "llava"] = "pallava",
    device: str | None = None,
    scores: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Writes one folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

    The language model is merged on the way, tensor by tensor; every part keeps its type.

    Args:
        base: Folder of the language model that was trained on.
        converted: What `xtuner-add pth-to-hf` wrote.
        out: The folder to write; a killed export continues in `OUT.partial`.
        layout: `pallava`, or `llava` for transformers' own LLaVA classes.
        device: `cpu` or `cuda`; by default a GPU where there is one.
        scores: Metrics for the model card, by benchmark.
        progress: Show a progress bar.

    Returns:
        SHA-256 digest by file name.

    Raises:
        FileNotFoundError: A folder that is not there.
        CheckpointError: Parts that do not fit, or a connector that `llava` has no place for.
    """
    converted = Path(converted)
    recipe, _ = read_conversion(converted)
    if layout == "llava":
        refuse_llava(converted / "projector")
    adapter = converted / "llm_adapter"
    merger = Merger(base, [adapter] if adapter.is_dir() else [], device)
    connector = load_connector(converted / "projector")
    encoder = load_vision_encoder(converted / "visual_encoder")
    _check_widths(merger.config, connector, encoder)
    parts = [converted, converted / "projector", converted / "visual_encoder"]
    inputs = {"operation": "export", "scores": scores, **merger.identity()}
    inputs["parts"] = [folder_identity(part) for part in parts]
    inputs["code"] = sorted(travelling_files().items())
    with FolderBuild(out, inputs) as build:
        if not build.complete:
            plan = merger.plan(untie=True)
            extra = _prefixed("visual_encoder.", encoder.state_dict())
            extra |= _prefixed("projector.", connector.state_dict())
            write_shards(merger, plan, build, prefix="llm.", extra=extra, progress=progress)
            image_token_id = _write_tokenizer(build, merger, converted, recipe)
            _write_small_files(build, merger, recipe, connector, encoder, scores)
            text_config = merger.config | plan.config_changes | {"tie_word_embeddings": False}
            config = _config(text_config, recipe, connector, encoder)
            write_config(build, config | {"image_token_id": image_token_id})
        return build.finish()


def refuse_llava(projector: Path) -> None:
    """Says why a connector cannot become stock LLaVA.

    Transformers' `LlavaForConditionalGeneration` has a two-layer MLP between encoder and language
    model and nothing else; a transformer stack over thumbnail and sub-images is no such MLP.

    Raises:
        CheckpointError: Always for a scale-invariant connector; for others with what is missing.
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
        # The published mask belongs to training in batches; answers never depend on neighbours.
        "sub_image_mask": "exact",
        "tie_word_embeddings": False,
    }


def _write_tokenizer(build: FolderBuild, merger: Merger, converted: Path, recipe: Recipe) -> int:
    """Writes the tokenizer with its image mark and chat template; returns the mark's id."""
    import tempfile

    from transformers import AddedToken, AutoTokenizer

    has_own = (converted / "tokenizer_config.json").is_file()
    source = converted if has_own else merger.base.folder
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, normalized=False, special=True)]},
        replace_additional_special_tokens=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        if recipe.prompt_template:
            with_chat_template(folder, recipe.prompt_template)
        copy_files(folder, build, (*_TOKENIZER_FILES, "chat_template.*"))
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
    config |= {"eos_token_id": ids, "pad_token_id": config.get("pad_token_id", pad)}
    return {name: value for name, value in config.items() if name != "_from_model_config"}


def _write_small_files(
    build: FolderBuild,
    merger: Merger,
    recipe: Recipe,
    connector: ScaleInvariantConnector,
    encoder: PLIPVisionEncoder,
    scores: dict[str, Any] | None,
) -> None:
    copy_files(merger.base.folder, build, _LICENCES)
    for name, source in travelling_files().items():
        with build.file(name) as partial:
            partial.write_text(source, encoding="utf-8")
    config = processor_config(recipe, connector.config, encoder.config.image_size)
    config["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    with build.file("processor_config.json") as partial:
        partial.write_text(_json(config))
    with build.file("README.md") as partial:
        write_card(partial, recipe, connector.config, scores or {})


def _check_widths(
    text_config: dict[str, Any], connector: ScaleInvariantConnector, encoder: PLIPVisionEncoder
) -> None:
    pairs = (
        ("language model", text_config.get("hidden_size"), connector.config.llm_hidden_size),
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

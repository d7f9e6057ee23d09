"""Converts a training checkpoint to separate folders, without loading the language model.

OUT/llm_adapter/     LoRA adapter in PEFT's format
OUT/projector/       connector
OUT/visual_encoder/  vision encoder and its image processor, or slide token encoder
OUT/                 tokenizer with its chat template, conversion.json, and for images
                     processor_config.json
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pallava.anyres import CLIP_MEAN, CLIP_STD
from pallava.folder_build import FolderBuild
from pallava.inference.loading import CONVERSION_NAME
from pallava.modeling.folders import (
    connector_config_of,
    load_vision_encoder,
    read_vision_config,
    save_connector,
    save_slide_encoder,
    save_vision_encoder,
)
from pallava.modeling.plip import PLIPVisionEncoder, published_names
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector, connector_state_dict
from pallava.modeling.slide_tokens import SlideTokenConfig, SlideTokenEncoder
from pallava.release.adapters import CONFIG_NAME, Adapter, AdapterError
from pallava.release.base_match import BASE_NAME, describe_base, find_model
from pallava.release.zero import load_checkpoint
from pallava.text.chat_template import chat_template
from pathcore.files import StrPath, file_identity
from pathcore.weights import CheckpointError, StateDict, check_finite, load_strict

_LLM = "llm."


@dataclass
class Recipe:
    """Settings of a training config that the checkpoint does not contain.

    Args:
        base_model: Folder or Hub name of the language model used in training.
        lora: Fields of PEFT's LoraConfig; empty if the language model was not adapted.
        visual_encoder: Folder of the vision encoder; for slides, name of the tile encoder.
        freeze_visual_encoder: Whether the encoder was frozen and the checkpoint thus lacks it.
        visual_select_layer: Index of the encoder's hidden state that the connector reads.
        sub_image_mask: See `pallava.modeling.llava.MultimodalMixin`.
        prompt_template: Fields of `pallava.text.templates.PromptTemplate`.
        image_mean: Channel means in 0..1.
        image_std: Channel standard deviations in 0..1.
        ties: See `pallava.anyres.choose_grid`.
        pad_to_square: Whether training padded the images with the mean colour.
        sub_images: Whether training read sub-images; a connector with cross-attention can be
            trained on thumbnails alone.
        training: Details of the run for the model card: data, schedule, config file.
        slide_tokens: Fields of `SlideTokenConfig` of a model of slides, whose checkpoint holds the
            encoder; empty for a model of images.
    """

    base_model: str
    lora: dict[str, Any]
    visual_encoder: str
    freeze_visual_encoder: bool = True
    visual_select_layer: int = -2
    sub_image_mask: str = "exact"
    prompt_template: dict[str, Any] = field(default_factory=dict)
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    ties: str = "published"
    pad_to_square: bool = False
    sub_images: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    slide_tokens: dict[str, Any] = field(default_factory=dict)


def convert_checkpoint(
    checkpoint: StrPath,
    recipe: Recipe,
    out: StrPath,
    *,
    save_tokenizer: Callable[[Path], None] | None = None,
    config_file: Path | None = None,
    fp32: bool = False,
) -> dict[str, str]:
    """Writes adapter, connector, encoder, tokenizer and processor.

    Args:
        checkpoint: `.pth` file or DeepSpeed ZeRO-1, -2 or -3 folder.
        recipe: Settings of the training config.
        out: Output folder.
        save_tokenizer: Function that writes the tokenizer's files into a folder.
        config_file: Training config, copied to `xtuner_config.py`.
        fp32: Whether to keep the adapter in fp32 instead of half precision, XTuner's default.

    Returns:
        SHA-256 digest by file name.

    Raises:
        FileNotFoundError: If the checkpoint or encoder does not exist.
        CheckpointError: If the checkpoint does not fit the recipe, or contains non-finite values.
    """
    path = Path(checkpoint)
    identity = [file_identity(p) for p in (sorted(path.iterdir()) if path.is_dir() else [path])]
    inputs = {
        "operation": "pth-to-hf",
        "checkpoint": identity,
        "recipe": asdict(recipe),
        "fp32": fp32,
    }
    state_dict = load_checkpoint(path)
    check_finite(state_dict, path)
    with FolderBuild(out, inputs) as build:
        if build.complete:
            return build.finish()
        _adopt(build, "llm_adapter", lambda folder: _save_adapter(state_dict, recipe, folder, fp32))
        _adopt(build, "visual_encoder", lambda folder: _save_encoder(state_dict, recipe, folder))
        connector = _connector(state_dict, recipe)
        _adopt(build, "projector", lambda folder: save_connector(connector, folder))
        if save_tokenizer is not None:
            _adopt(build, "", lambda folder: _save_tokenizer(save_tokenizer, recipe, folder))
        if not recipe.slide_tokens:
            tile_px = read_vision_config(build.folder / "visual_encoder").image_size
            with build.file("processor_config.json") as partial:
                partial.write_text(_json(processor_config(recipe, connector.config, tile_px)))
        if config_file is not None:
            with build.file("xtuner_config.py") as partial:
                shutil.copyfile(config_file, partial)
        with build.file(CONVERSION_NAME) as partial:
            partial.write_text(_json({"checkpoint": str(checkpoint), **asdict(recipe)}))
        return build.finish()


def processor_config(recipe: Recipe, connector: ConnectorConfig, tile_px: int) -> dict[str, Any]:
    """Returns the content of `processor_config.json` for the exported processor."""
    return {
        "processor_class": "PALLaVAProcessor",
        "tile_px": tile_px,
        "image_mean": list(recipe.image_mean),
        "image_std": list(recipe.image_std),
        "sub_images": connector.cross_attention and recipe.sub_images,
        "ties": recipe.ties,
        "pad_to_square": recipe.pad_to_square,
        "image_token": "<image>",
        "add_bos": not recipe.prompt_template.get("CHAT_TEMPLATE"),
    }


def read_conversion(folder: StrPath) -> tuple[Recipe, dict[str, Any]]:
    """Reads the record that `convert_checkpoint` left in a folder.

    Raises:
        FileNotFoundError: If the folder was not written by `convert_checkpoint`.
    """
    file = Path(folder) / CONVERSION_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: no {CONVERSION_NAME}; write the folder with `xtuner-add pth-to-hf`"
        )
    values = json.loads(file.read_bytes())
    if "base_model" not in values:
        raise FileNotFoundError(
            f"{file}: holds the prompt template alone, as `xtuner-add convert pth_to_hf` records "
            "it; write the folder with `xtuner-add pth-to-hf`"
        )
    known = {name: values[name] for name in Recipe.__dataclass_fields__ if name in values}
    return Recipe(**known), values


def with_chat_template(folder: Path, template: Mapping[str, Any]) -> None:
    """Writes the chat template to tokenizer_config.json, which all transformers versions read."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    config["chat_template"] = template.get("CHAT_TEMPLATE") or chat_template(template)
    file.write_text(_json(config))
    for other in folder.glob("chat_template.*"):  # would take precedence
        other.unlink()


def _save_adapter(state_dict: StateDict, recipe: Recipe, folder: Path, fp32: bool) -> None:
    """Writes the adapter; strips `llm.` and the adapter name from tensor names, as PEFT does."""
    tensors = {
        name.removeprefix(_LLM).replace(".default.", ".").removesuffix(".default"): tensor
        for name, tensor in state_dict.items()
        if name.startswith(_LLM)
    }
    if not tensors:
        return
    if not recipe.lora or not all(name.startswith("base_model.model.") for name in tensors):
        raise CheckpointError(
            "the checkpoint holds the language model itself, not LoRA; use `xtuner-add convert "
            "pth_to_hf`"
        )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **recipe.lora}
    config |= {"base_model_name_or_path": recipe.base_model, "inference_mode": True}
    if not config.get("target_modules"):
        modules = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in modules})
    tensors = {
        name.replace(".modules_to_save.", "."): (tensor if fp32 else tensor.half())
        .contiguous()
        .clone()
        for name, tensor in tensors.items()
    }
    check_finite(tensors, "the adapter in half precision (keep its fp32 with --fp32)")
    (folder / CONFIG_NAME).write_text(_json(config))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    _check_adapter(folder)
    base = find_model(recipe.base_model)
    if base is not None and (described := describe_base(base)):
        (folder / BASE_NAME).write_text(_json(described))


def _check_adapter(folder: Path) -> None:
    """Rejects a checkpoint whose LoRA differs from the config in rank, kind or modules."""
    try:
        adapter = Adapter(folder)
    except AdapterError as error:
        reason = str(error).removeprefix(f"{folder}: ").replace(CONFIG_NAME, "the training config")
        raise CheckpointError(f"the checkpoint does not fit its config: {reason}") from error
    targets = adapter.config["target_modules"]
    if not isinstance(targets, list | tuple | set):
        return  # a regular expression or "all-linear"
    other = [
        part.module
        for part in adapter.parts.values()
        if not any(part.module == t or part.module.endswith(f".{t}") for t in targets)
    ]
    if other:
        raise CheckpointError(
            f"the checkpoint does not fit its config: it holds LoRA for {', '.join(other[:5])}, "
            f"the config's target_modules are {', '.join(sorted(targets))}"
        )


def _connector(state_dict: StateDict, recipe: Recipe) -> ScaleInvariantConnector:
    tensors = connector_state_dict(state_dict)
    if not tensors:
        raise CheckpointError("the checkpoint contains no connector (no projector.*)")
    if recipe.slide_tokens:
        heads = SlideTokenConfig(**recipe.slide_tokens).num_attention_heads
    else:
        heads = read_vision_config(recipe.visual_encoder).num_attention_heads
    config = connector_config_of(tensors, num_attention_heads=heads)
    with torch.device("meta"):
        connector = ScaleInvariantConnector(config)
    load_strict(connector, tensors, what="connector", source="checkpoint")
    return connector


def _save_encoder(state_dict: StateDict, recipe: Recipe, folder: Path) -> None:
    if recipe.slide_tokens:
        slides = SlideTokenEncoder(**recipe.slide_tokens)
        prefix = "visual_encoder."
        tensors = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        load_strict(slides, tensors, what="slide token encoder", source="checkpoint")
        save_slide_encoder(slides, folder)
        return
    trained = published_names(
        {n: t for n, t in state_dict.items() if n.startswith("visual_encoder.")}
    )
    if not trained and not recipe.freeze_visual_encoder:
        raise CheckpointError(
            "the encoder was trained, but the checkpoint contains no visual_encoder.*"
        )
    encoder: PLIPVisionEncoder = load_vision_encoder(recipe.visual_encoder)
    if trained:
        load_strict(encoder, trained, what="vision encoder", source="checkpoint")
    save_vision_encoder(encoder, folder, recipe.image_mean, recipe.image_std)


def _save_tokenizer(save: Callable[[Path], None], recipe: Recipe, folder: Path) -> None:
    save(folder)
    if recipe.prompt_template:
        with_chat_template(folder, recipe.prompt_template)


def _adopt(build: FolderBuild, name: str, make: Callable[[Path], None]) -> None:
    """Lets `make` write a temporary folder and moves its files into the build one by one."""
    with tempfile.TemporaryDirectory(dir=build.folder) as temporary:
        make(Path(temporary))
        for source in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            relative = Path(name) / source.relative_to(temporary)
            with build.file(relative.as_posix()) as partial:
                os.replace(source, partial)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=sorted) + "\n"

"""Loads and saves the folders of encoders and connectors, and registers both by name.

This code is separate from the models: their modules are copied into every exported model
(`pallava.release.remote_code`) and so must not depend on file formats or registries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from pallava.anyres import CLIP_MEAN, CLIP_STD
from pallava.modeling.plip import (
    POSITION_IDS,
    PUBLISHED_TO_HF,
    PLIPVisionEncoder,
    published_names,
    rename_prefixes,
)
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.modeling.slide_tokens import SlideTokenConfig, SlideTokenEncoder
from pallava.registry import CONNECTORS, ENCODERS
from pathcore.files import StrPath, staged_files
from pathcore.weights import CheckpointError, load_strict, read_state_dict

CONNECTOR_MODEL_TYPE = "q_former_projector"
"""`model_type` in published `projector/config.json` files."""

SLIDE_TOKENS_MODEL_TYPE = "slide_tokens"
"""`model_type` in `visual_encoder/config.json` of a slide token encoder."""

_CONNECTOR_LAYER = "model.bert.encoder.layer."
_BERT_HEAD_WIDTH = 64  # of all published sizes; weights do not tell the number of heads

_Encoder = TypeVar("_Encoder", bound=PLIPVisionEncoder)


def load_vision_encoder(
    folder: StrPath,
    encoder_class: type[_Encoder] = PLIPVisionEncoder,  # type: ignore[assignment]
) -> _Encoder:
    """Loads the vision tower of a CLIP, PLIP or PathGen-CLIP folder.

    Args:
        folder: Folder with `config.json` and weights of the vision tower or of the whole CLIP,
            under Hugging Face's or the published parameter names.
        encoder_class: Subclass to build instead of `PLIPVisionEncoder`.

    Raises:
        FileNotFoundError: If the folder or its `config.json` does not exist.
        CheckpointError: If the weights do not match the config.
    """
    encoder = encoder_class(read_vision_config(folder))
    state_dict = published_names(read_state_dict(folder))
    if not state_dict:
        raise CheckpointError(f"{folder}: the weights hold no vision_model.*")
    load_strict(encoder, state_dict, what="vision encoder", source=str(folder))
    return encoder


def save_vision_encoder(
    encoder: PLIPVisionEncoder,
    folder: StrPath,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> None:
    """Saves a folder that both `load_vision_encoder` and `CLIPVisionModel` can load."""
    from transformers import CLIPImageProcessor  # imports torchvision, which takes 2 s

    size = encoder.config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
    config = CLIPVisionConfig(**encoder.config.to_dict())
    config.architectures = ["CLIPVisionModel"]
    tensors = {
        rename_prefixes(name, PUBLISHED_TO_HF): tensor
        for name, tensor in encoder.state_dict().items()
        if name != POSITION_IDS  # a constant buffer that newer Hugging Face versions reject
    }
    with staged_files(folder, last="model.safetensors") as stage:
        processor.save_pretrained(stage)
        config.save_pretrained(stage)
        _save_tensors(stage, tensors)


def read_vision_config(folder: StrPath) -> CLIPVisionConfig:
    """Reads the vision part of a CLIP folder's `config.json`.

    Raises:
        FileNotFoundError: If the folder or its `config.json` does not exist.
        ValueError: If the config does not describe a CLIP vision tower.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"visual encoder {folder}: expected a folder with config.json and weights (download "
            "the released plip.tar.gz, or train one with configs/pallava/plip_pretraining.py)"
        )
    config = _read_json(file)
    config = config.get("vision_config", config) if isinstance(config, dict) else {}
    if "patch_size" not in config or "image_size" not in config:
        raise ValueError(f"{file}: no CLIP vision config; expected image_size and patch_size")
    return CLIPVisionConfig(**config)


def load_connector(folder: StrPath) -> ScaleInvariantConnector:
    """Loads a `projector/` folder, either published or written by `save_connector`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        CheckpointError: If its tensors are not those of a connector.
    """
    folder = Path(folder)
    state_dict = read_state_dict(folder)
    file = folder / "config.json"
    stated = _read_json(file) if file.is_file() else {}
    heads = stated.get("num_attention_heads")
    config = connector_config_of(state_dict, num_attention_heads=int(heads) if heads else None)
    # Published configs do not state sizes, so they are read from the tensors. Dropout leaves no
    # trace in tensors and is read from the config.
    known = {field.name for field in fields(ConnectorConfig)}
    dropouts = {n: value for n, value in stated.items() if n in known and n.endswith("_prob")}
    connector = ScaleInvariantConnector(ConnectorConfig(**(asdict(config) | dropouts)))
    load_strict(connector, state_dict, what="connector", source=str(folder))
    return connector


def save_connector(connector: Any, folder: StrPath) -> None:
    """Saves `config.json` and `model.safetensors` of a connector.

    Args:
        connector: Module whose `config` is a `ConnectorConfig`.
        folder: Output folder.
    """
    config = {"model_type": CONNECTOR_MODEL_TYPE, **asdict(connector.config)}
    save_module(connector, config, folder)


def connector_config_of(
    state_dict: Mapping[str, Tensor], *, num_attention_heads: int | None = None
) -> ConnectorConfig:
    """Infers a connector's sizes and mode from the names and shapes of its tensors.

    Args:
        state_dict: Tensors, named without the prefix `projector.`.
        num_attention_heads: Number of heads, which the shapes do not reveal. Defaults to BERT's 64
            channels per head, which gives the 12 heads of the released weights.

    Raises:
        CheckpointError: If these are not the tensors of a connector.
    """
    layers = {_layer_index(name) for name in state_dict if name.startswith(_CONNECTOR_LAYER)}
    try:
        intermediate_size, width = state_dict[
            f"{_CONNECTOR_LAYER}0.intermediate_query.dense.weight"
        ].shape
        llm_hidden_size = state_dict["model.mlp.model.0.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"no connector checkpoint: {error} is missing; found "
            f"{', '.join(sorted(state_dict)[:5])} ..."
        ) from error
    crossed = sorted({_layer_index(name) for name in state_dict if ".crossattention." in name})
    frequency = len(layers) if crossed else 1  # one layer: interval >= depth
    if len(crossed) > 1:
        frequency = crossed[1] - crossed[0]
    return ConnectorConfig(
        visual_hidden_size=width,
        llm_hidden_size=llm_hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=num_attention_heads or max(1, width // _BERT_HEAD_WIDTH),
        intermediate_size=intermediate_size,
        cross_attention=bool(crossed),
        cross_attention_freq=frequency,
        depth=sum(name.startswith("model.mlp.model.") for name in state_dict) // 2,
    )


def load_slide_encoder(folder: StrPath) -> SlideTokenEncoder:
    """Loads a folder written by `save_slide_encoder`.

    Raises:
        FileNotFoundError: If the folder or its `config.json` does not exist.
        CheckpointError: If the folder holds a different kind of model.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"slide token encoder {folder}: no config.json there")
    values = _read_json(file)
    if values.get("model_type") != SLIDE_TOKENS_MODEL_TYPE:
        raise CheckpointError(
            f"{file}: expected model_type {SLIDE_TOKENS_MODEL_TYPE!r}, found "
            f"{values.get('model_type')!r}"
        )
    known = {field.name for field in fields(SlideTokenConfig)}
    encoder = SlideTokenEncoder(**{name: value for name, value in values.items() if name in known})
    state_dict = read_state_dict(folder)
    load_strict(encoder, state_dict, what="slide token encoder", source=str(folder))
    return encoder


def save_slide_encoder(encoder: SlideTokenEncoder, folder: StrPath) -> None:
    """Saves `config.json` and `model.safetensors` of a slide token encoder."""
    save_module(encoder, {"model_type": SLIDE_TOKENS_MODEL_TYPE, **asdict(encoder.config)}, folder)


def save_module(module: nn.Module, config: dict[str, Any], folder: StrPath) -> None:
    """Saves `config.json` and `model.safetensors`."""
    with staged_files(folder, last="model.safetensors") as stage:
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _save_tensors(stage, module.state_dict())


def _save_tensors(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    # safetensors rejects tensors that share memory, such as expanded buffers and tied weights.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: no JSON: {error}") from error


def _layer_index(name: str) -> int:
    return int(name.removeprefix(_CONNECTOR_LAYER).split(".", 1)[0])


ENCODERS.register("plip")(load_vision_encoder)
ENCODERS.register("slide_tokens")(load_slide_encoder)
CONNECTORS.register("qformer_mlp")(ScaleInvariantConnector)

"""Vision models of transformers: CLIP and PLIP, DINOv2, ViT."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cite.blocks import Block, Split, normalise
from cite.encoders.base import Encoder, fit_positions

_CLIP_TYPES = ("clip", "clip_vision_model")
_DINO_TYPES = ("dinov2", "dinov2_with_registers")
_VIT_TYPES = ("vit", "deit")
MODEL_TYPES = (*_CLIP_TYPES, *_DINO_TYPES, *_VIT_TYPES)

_MISSPELLED = "vision_model.post_layrnorm."
"""As the published PLIP of PA-LLaVA calls `vision_model.post_layernorm.`."""


class HuggingFaceEncoder(Encoder):
    """A vision model of transformers; the class token after the last norm.

    Args:
        config: The model's config: a folder with `config.json`, that file, or its content. Of a
            whole CLIP the vision tower is taken.
        project: For CLIP: multiply by the visual projection.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A model that is not among `MODEL_TYPES`.
    """

    def __init__(
        self, config: str | os.PathLike[str] | Mapping[str, Any], project: bool = False
    ) -> None:
        super().__init__()
        values = read_vision_config(config)
        self.spec = {"kind": "hf", "config": values, "project": project}
        self.family = _family(values["model_type"])
        if project and self.family != "clip":
            raise ValueError(f"project: {values['model_type']} has no visual projection")
        self.model = _build(values, project)
        self.width = values_of(self.model, "hidden_size")
        self.embed_dim = values_of(self.model, "projection_dim") if project else self.width
        self.num_prefix = 1 + (getattr(self.model.config, "num_register_tokens", 0) or 0)
        self.num_prefix += 1 if values["model_type"] == "deit" else 0
        self.num_heads = values_of(self.model, "num_attention_heads")
        self.lora_targets = (
            ("q_proj", "v_proj")
            if self.family == "clip"
            else ("attention.query", "attention.value")
        )

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`."""
        if self.family == "clip":
            model = self.model.vision_model
            dtype = model.embeddings.patch_embedding.weight.dtype
            tokens = model.embeddings(pixel_values.to(dtype)).to(dtype)
            return normalise(model.pre_layrnorm, tokens)
        dtype = self.model.embeddings.patch_embeddings.projection.weight.dtype
        return self.model.embeddings(pixel_values.to(dtype)).to(dtype)

    def blocks(self) -> Sequence[Block]:
        """See `Encoder`."""
        make = {"clip": _clip_block, "dino": _dino_block, "vit": _vit_block}[self.family]
        encoder = (self.model.vision_model if self.family == "clip" else self.model).encoder
        layers = encoder.layers if self.family == "clip" else encoder.layer
        return [make(layer, self.num_heads) for layer in layers]

    def pool(self, hidden_states: Tensor) -> Tensor:
        """See `Encoder`."""
        if self.family != "clip":
            return normalise(self.model.layernorm, hidden_states[:, 0])
        features = normalise(self.model.vision_model.post_layernorm, hidden_states[:, 0])
        project = getattr(self.model, "visual_projection", None)
        return features if project is None else project(features)

    def adapt_checkpoint(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the vision tower out of a whole model, in Hugging Face's or PA-LLaVA's names."""
        own = self.model.state_dict()
        adapted: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            name = name.removeprefix("visual_encoder.")
            name = name.removeprefix(f"{self.spec['config']['model_type']}.")
            name = name.replace(_MISSPELLED, "vision_model.post_layernorm.")
            if name in own or name.startswith(("vision_model.", "embeddings.", "encoder.")):
                adapted[name] = tensor
        unused = (".position_ids", ".mask_token")
        adapted = {k: v for k, v in adapted.items() if not k.endswith(unused)}
        positions = next(name for name in own if "position_embedding" in name)
        fit_positions(adapted, positions, own[positions], self._num_positioned_prefix())
        return adapted

    def _num_positioned_prefix(self) -> int:
        return 2 if self.spec["config"]["model_type"] == "deit" else 1


def read_vision_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Reads the config of a vision model; of a whole CLIP the vision part.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a vision model that is known.
    """
    source = "config"
    if not isinstance(config, Mapping):
        file = Path(config)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"{file}: a folder with config.json and weights expected")
        source, config = str(file), json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{source}: a JSON object expected")
    values = dict(config)
    if "vision_config" in values:
        projection = values.get("projection_dim")
        values = {"model_type": "clip_vision_model", **values["vision_config"]}
        if projection is not None:
            values["projection_dim"] = projection
    if "model_type" not in values and {"image_size", "patch_size"} <= set(values):
        values["model_type"] = "clip_vision_model"  # folders of older versions do not say
    if values.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{source}: model_type {values.get('model_type')!r}; one of {MODEL_TYPES} expected"
        )
    return json.loads(json.dumps(values))


def values_of(model: nn.Module, name: str) -> int:
    """Returns a whole number from a model's config."""
    return int(getattr(model.config, name))


def _family(model_type: str) -> str:
    if model_type in _CLIP_TYPES:
        return "clip"
    return "dino" if model_type in _DINO_TYPES else "vit"


def _build(values: Mapping[str, Any], project: bool) -> nn.Module:
    import transformers

    arguments = {k: v for k, v in values.items() if k != "model_type"}
    if _family(values["model_type"]) == "clip":
        config = transformers.CLIPVisionConfig(**arguments)
        name = "CLIPVisionModelWithProjection" if project else "CLIPVisionModel"
        return getattr(transformers, name)(config)
    config = transformers.AutoConfig.for_model(values["model_type"], **arguments)
    model = transformers.AutoModel.from_config(config)
    if hasattr(model, "pooler"):
        model.pooler = None
    if hasattr(model.embeddings, "mask_token"):
        model.embeddings.mask_token = None
    return model


def _clip_block(layer: Any, num_heads: int) -> Block:
    attention = layer.self_attn
    return Block(
        norm1=layer.layer_norm1,
        project=Split(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=num_heads,
        out=attention.out_proj,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
    )


def _dino_block(layer: Any, num_heads: int) -> Block:
    attention = layer.attention.attention
    return Block(
        norm1=layer.norm1,
        project=Split(attention.query, attention.key, attention.value),
        num_heads=num_heads,
        out=layer.attention.output.dense,
        norm2=layer.norm2,
        mlp=layer.mlp,
        scale1=layer.layer_scale1,
        scale2=layer.layer_scale2,
    )


def _vit_block(layer: Any, num_heads: int) -> Block:
    attention = layer.attention.attention
    return Block(
        norm1=layer.layernorm_before,
        project=Split(attention.query, attention.key, attention.value),
        num_heads=num_heads,
        out=layer.attention.output.dense,
        norm2=layer.layernorm_after,
        mlp=lambda hidden: layer.output.dense(layer.intermediate(hidden)),
    )

"""Image towers: networks of timm, transformers and open_clip with the pooling of their output.

The architecture of a tower is described by JSON values:

    {"library": "timm", "architecture": "vit_base_patch16_224", "arguments": {}, "feature": "class"}
    {"library": "own", "architecture": "ctranspath", "arguments": {}}
    {"library": "transformers", "config": {"model_type": "dinov2", ...}, "feature": "class"}
    {"library": "open_clip", "config": {"embed_dim": 512, "vision_cfg": {...}, "quick_gelu": true}}

`build_tower` builds a tower with random weights; `open_tower` also loads published ones, strictly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathcore.encoders.layouts import FittedLayout, fit_layout, fit_positions, pools_patches
from pathcore.encoders.networks import NETWORKS, uninitialised
from pathcore.names import did_you_mean
from pathcore.weights import CheckpointError, load_strict

logger = logging.getLogger(__name__)

CLIP_TYPES = ("clip", "clip_vision_model")
DINO_TYPES = ("dinov2", "dinov2_with_registers")
VIT_TYPES = ("vit", "deit")
VISION_TYPES = (*CLIP_TYPES, *DINO_TYPES, *VIT_TYPES)
"""Vision transformers of transformers with a class token, by `model_type`."""

POOLED_TYPES = ("swin", "swinv2", "convnext", "convnextv2", "resnet")
"""Models of transformers without a class token, which pool by themselves."""

OPENAI_ENTRIES = ("context_length", "input_resolution", "vocab_size")
"""Entries of the archives of OpenAI's CLIP that are not weights."""

_MISSPELLED = "vision_model.post_layrnorm."
"""Spelling of `vision_model.post_layernorm.` in the published PLIP of PA-LLaVA."""


class EncoderError(ValueError):
    """Raised if a name or description is invalid, or the encoder cannot be built."""


@dataclass(frozen=True, eq=False)
class Tower:
    """An image network with the function that computes its features.

    Attributes:
        module: The network.
        features: Maps `(batch, 3, height, width)` to `(batch, embed_dim)`. A callable object that
            holds `module`, so that a deep copy of the tower uses the copied network.
        embed_dim: Length of the features.
        feature: How the output becomes a vector, see `Preset.feature`.
        description: Description from which `build_tower` builds the tower; empty for networks that
            only the code of their authors can build.
        files: Files of the weights; empty if weights are random or a library downloaded them.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    embed_dim: int
    feature: str
    description: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TokenPooling:
    """Pools normalised tokens `(batch, num_tokens, dim)`.

    Attributes:
        feature: `class`, `mean` (of the patch tokens) or `class+mean`.
        num_prefix: Number of class and register tokens before the patch tokens. Register tokens are
            not pooled.

    Example:
        >>> TokenPooling("class+mean", num_prefix=5)(torch.zeros(2, 5 + 196, 768)).shape
        torch.Size([2, 1536])
    """

    feature: str
    num_prefix: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns `(batch, dim)`, or `(batch, 2 * dim)` for `class+mean`."""
        if self.feature == "class":
            return tokens[:, 0]
        mean = tokens[:, self.num_prefix :].mean(1)
        return mean if self.feature == "mean" else torch.cat([tokens[:, 0], mean], dim=-1)


TOKEN_FEATURES = ("class", "mean", "class+mean")


@dataclass(frozen=True, eq=False)
class Call:
    """Calls a network and returns its output, or the first one if there are several.

    Attributes:
        module: The network.
    """

    module: nn.Module

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Maps `(batch, 3, height, width)` to `(batch, embed_dim)`."""
        output = self.module(pixel_values)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


def build_tower(description: Mapping[str, Any]) -> Tower:
    """Builds a tower with random weights.

    Args:
        description: Description of the tower; the module docstring gives examples.

    Raises:
        EncoderError: If the library, architecture or feature is unknown.

    Example:
        >>> tower = build_tower({"library": "timm", "architecture": "resnet18"})
        >>> tower.features(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    rest = dict(description)
    library = rest.pop("library", None)
    if library not in _BUILDERS:
        raise EncoderError(f"encoder library {library!r}: expected one of {', '.join(_BUILDERS)}")
    try:
        return _BUILDERS[library](**rest)
    except TypeError as error:
        if "unexpected keyword" in str(error) or "missing" in str(error):
            raise EncoderError(f"encoder of {library}: {error}") from error
        raise


def open_tower(
    description: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    name: str,
    source: object,
) -> Tower:
    """Builds a tower and loads published weights.

    If the weights of a ViT were fine-tuned on the mean of the patch tokens (MAE's `fc_norm`), the
    pooling is switched to `mean`, because the class token was never normalised.

    Args:
        description: Description of the tower; the module docstring gives examples.
        state_dict: Tensors, as `pathcore.weights.read_state_dict` returns them.
        name: Name of the encoder, for error messages.
        source: Source of the weights, for error messages.

    Raises:
        EncoderError: If the library, architecture or feature is unknown.
        CheckpointError: If a tensor is missing, unexpected or of a different shape.
    """
    description = dict(description)
    if description.get("library") == "timm" and pools_patches(state_dict):
        if description.get("feature") not in (None, "class", "mean"):
            raise CheckpointError(
                f"{source}: was fine-tuned on the mean of its patch tokens (fc_norm), so "
                f"{description['feature']!r} was never trained; use feature='mean'"
            )
        arguments = {**description.get("arguments", {}), "global_pool": "avg"}
        description |= {"arguments": arguments, "feature": "mean"}
    towers: list[Tower] = []

    def build() -> nn.Module:
        towers.append(build_tower(description))
        return towers[-1].module

    module = uninitialised(build)
    if description["library"] == "open_clip" and not set(OPENAI_ENTRIES).isdisjoint(state_dict):
        check_quick_gelu(towers[-1].description["config"], name, source, name)
    fitted = _FITS[description["library"]](state_dict, module)
    # Some weights are released in half precision. Assigned to parameters on the meta device, they
    # would change the type of the network.
    weights = {n: t.float() if t.is_floating_point() else t for n, t in fitted.state_dict.items()}
    load_strict(module, weights, what=f"encoder {name}", source=str(source), hint=_whose_weights)
    if dropped := fitted.describe():
        logger.info("encoder %s: %s: dropped %s", name, source, dropped)
    return towers[-1]


def _whose_weights(state_dict: Mapping[str, Tensor]) -> str:
    """Returns a hint which encoder the weights belong to, or an empty string."""
    if "patch_embed.proj.3.weight" in state_dict or "patch_embed.proj.0.weight" in state_dict:
        return "These are weights of CTransPath: encoder='ctranspath'."
    if any("relative_position_bias_table" in name for name in state_dict):
        return "These are weights of a Swin: encoder='timm:swin_...'."
    if any(".dcn." in name for name in state_dict):
        return (
            "These are weights of InternImage, whose deformable convolution is in no library used "
            "here; its authors' code builds it: github.com/OpenGVLab/InternImage."
        )
    if "layer1.0.conv1.weight" in state_dict:
        return "These are weights of a ResNet: encoder='timm:resnet...'."
    return ""


# --- timm ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _TimmReading:
    module: Any
    feature: str

    def __call__(self, pixel_values: Tensor) -> Tensor:
        module = self.module
        if self.feature == "layer3":  # CLAM reads a ResNet after its third stage
            maps = module.forward_intermediates(pixel_values, indices=[3], intermediates_only=True)
            return maps[0].mean((-2, -1))
        # With `avg` pooling timm normalises after the mean (fc_norm), otherwise each token before.
        if self.feature == "output" or (self.feature == "mean" and module.global_pool == "avg"):
            return module(pixel_values)
        pool = TokenPooling(self.feature, int(module.num_prefix_tokens))
        return pool(module.forward_features(pixel_values))


def _timm(
    architecture: str, arguments: Mapping[str, Any] | None = None, feature: str | None = None
) -> Tower:
    import timm
    from timm import layers

    # A round trip through JSON gives the same values as a config file or an exported classifier.
    stored = json.loads(json.dumps({"num_classes": 0, **(arguments or {})}))
    settings = dict(stored)
    if isinstance(settings.get("mlp_layer"), str):
        if not hasattr(layers, settings["mlp_layer"]):
            raise EncoderError(
                f"mlp_layer {settings['mlp_layer']!r}: timm.layers has no such layer"
            )
        settings["mlp_layer"] = getattr(layers, settings["mlp_layer"])
    if isinstance(settings.get("act_layer"), str):
        settings["act_layer"] = layers.get_act_layer(settings["act_layer"])
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise EncoderError(f"encoder timm:{architecture}: timm has no such model{hint}")
    module: Any = timm.create_model(architecture, pretrained=False, **settings)
    # "" leaves the pooling to the reader, as in Virchow's configuration.
    pooling = getattr(module, "global_pool", None)
    has_token = getattr(module, "cls_token", None) is not None
    pools_token = pooling in ("token", "") and has_token
    feature = feature or ("class" if pools_token else "output")
    if feature in TOKEN_FEATURES and not hasattr(module, "num_prefix_tokens"):
        raise EncoderError(
            f"encoder {architecture}: {type(module).__name__} has no tokens, so "
            f"feature={feature!r} cannot be read; use feature='output'"
        )
    if feature.startswith("class") and not has_token:
        raise EncoderError(
            f"encoder {architecture}: has no class token, so feature={feature!r} would be that of "
            "a patch or a register; use feature='mean' or 'output'"
        )
    if feature == "output" and pooling == "":
        raise EncoderError(
            f"encoder {architecture}: global_pool is '', so its output is not a vector; set "
            "global_pool, or feature='mean' for a vision transformer"
        )
    if feature not in (*TOKEN_FEATURES, "output", "layer3"):
        raise EncoderError(
            f"encoder {architecture}: feature {feature!r}, expected one of "
            f"{', '.join(TOKEN_FEATURES)}, output"
        )
    if feature == "layer3":
        embed_dim = int(module.feature_info[3]["num_chs"])
    elif feature == "output":  # the head of a MobileNet or VGG has a hidden layer
        embed_dim = int(getattr(module, "head_hidden_size", module.num_features))
    else:
        embed_dim = int(module.num_features) * (2 if feature == "class+mean" else 1)
    description = {
        "library": "timm", "architecture": architecture, "arguments": stored, "feature": feature
    }  # fmt: skip
    return Tower(module, _TimmReading(module, feature), embed_dim, feature, description)


def _own(
    architecture: str, arguments: Mapping[str, Any] | None = None, feature: str = "output"
) -> Tower:
    if architecture not in NETWORKS:
        hint = did_you_mean(architecture, NETWORKS)
        raise EncoderError(f"encoder {architecture!r}: no such network{hint}")
    stored = json.loads(json.dumps(dict(arguments or {})))
    module: Any = NETWORKS[architecture](**stored)
    description = {"library": "own", "architecture": architecture, "arguments": stored}
    return Tower(module, Call(module), int(module.num_features), feature, description)


# --- transformers -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TransformersReading:
    """Computes features by a model of transformers.

    Attributes:
        module: The model.
        feature: `projected`, `pooler`, `output` or one of `TOKEN_FEATURES`.
        num_prefix: Number of class and register tokens before the patch tokens.
    """

    module: Any
    feature: str
    num_prefix: int

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Maps `(batch, 3, height, width)` to `(batch, embed_dim)`."""
        if self.feature == "output":
            return self.module(pixel_values)
        if self.feature == "projected":
            if hasattr(self.module, "get_image_features"):
                return self.module.get_image_features(pixel_values=pixel_values)
            return self.module(pixel_values=pixel_values).image_embeds
        tower = getattr(self.module, "vision_model", self.module)
        output = tower(pixel_values=pixel_values)
        if self.feature == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise EncoderError(
                    f"{type(tower).__name__} has no pooler; say how it is read: feature='class', "
                    "'mean', 'class+mean' or 'output'"
                )
            return output.pooler_output.flatten(1)
        return TokenPooling(self.feature, self.num_prefix)(output.last_hidden_state)


def default_feature(model_type: str) -> str:
    """Returns the default feature of a vision model of transformers."""
    # CLIP normalises the class token only in the pooler; the first token of a Swin is a patch.
    return "class" if model_type in (*DINO_TYPES, *VIT_TYPES) else "pooler"


def _transformers(config: Mapping[str, Any], feature: str | None = None) -> Tower:
    import transformers

    values = vision_config(config)
    model_type = values["model_type"]
    feature = feature or default_feature(model_type)
    arguments = {k: v for k, v in values.items() if k != "model_type"}
    if feature == "projected" and model_type not in CLIP_TYPES:
        raise EncoderError(f"feature 'projected': {model_type} has no visual projection")
    module: Any
    if model_type in CLIP_TYPES:
        name = "CLIPVisionModelWithProjection" if feature == "projected" else "CLIPVisionModel"
        module = getattr(transformers, name)(transformers.CLIPVisionConfig(**arguments))
    else:
        module = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(model_type, **arguments)
        )
        drop_unread(module, feature)
    # In evaluation mode, like the models that from_pretrained returns.
    return transformers_tower(module.eval(), feature, values)


def drop_unread(module: Any, feature: str) -> None:
    """Removes pooler and mask token if the feature does not depend on them."""
    if hasattr(module, "pooler") and feature != "pooler":
        module.pooler = None
    if hasattr(getattr(module, "embeddings", None), "mask_token"):
        module.embeddings.mask_token = None


def transformers_tower(
    module: Any, feature: str, values: Mapping[str, Any], num_prefix: int | None = None
) -> Tower:
    """Wraps an image model of transformers as a tower.

    Args:
        module: The model, without a text tower.
        feature: `projected`, `pooler`, `output` or one of `TOKEN_FEATURES`.
        values: Config of the model with `model_type`, from which it can be built again; or empty.
        num_prefix: Number of class and register tokens; by default taken from the config.

    Raises:
        EncoderError: If the feature is unknown.
    """
    config = getattr(module, "vision_model", module).config
    if num_prefix is None:
        num_prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        num_prefix += values.get("model_type") == "deit"  # its distillation token
    hidden = int(getattr(config, "hidden_size", 0) or getattr(config, "hidden_sizes", [0])[-1])
    widths = {"class": hidden, "mean": hidden, "class+mean": 2 * hidden, "pooler": hidden}
    widths["projected"] = int(getattr(module.config, "projection_dim", None) or hidden)
    widths["output"] = 0
    if feature not in widths:
        raise EncoderError(
            f"feature {feature!r} of {type(module).__name__}: expected one of {', '.join(widths)}"
        )
    if feature in TOKEN_FEATURES and config.model_type in POOLED_TYPES:
        raise EncoderError(
            f"feature {feature!r} of {type(module).__name__}: it has no class token and pools by "
            "itself; use feature='pooler'"
        )
    description = {
        "library": "transformers", "config": dict(values), "feature": feature
    } if values else {}  # fmt: skip
    reading = TransformersReading(module, feature, num_prefix)
    return Tower(module, reading, widths[feature], feature, description)


def vision_config(config: Mapping[str, Any], source: str = "config") -> dict[str, Any]:
    """Returns the vision part of a model's `config.json`, with its `model_type`.

    Raises:
        EncoderError: If `model_type` is not in `VISION_TYPES`.
    """
    values = dict(config)
    if "vision_config" in values:
        projection = values.get("projection_dim")
        values = {"model_type": "clip_vision_model", **values["vision_config"]}
        if projection is not None:
            values["projection_dim"] = projection
    if "model_type" not in values and {"image_size", "patch_size"} <= set(values):
        values["model_type"] = "clip_vision_model"  # older versions do not store it
    known = (*VISION_TYPES, *POOLED_TYPES)
    if values.get("model_type") not in known:
        raise EncoderError(
            f"{source}: model_type {values.get('model_type')!r}, expected one of {', '.join(known)}"
        )
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def fit_transformers(state_dict: Mapping[str, Tensor], module: Any) -> FittedLayout:
    """Extracts the vision tower from a checkpoint with Hugging Face's or PA-LLaVA's names."""
    own = module.state_dict()
    adapted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        short = name.removeprefix("visual_encoder.").removeprefix(f"{module.base_model_prefix}.")
        short = short.removeprefix(f"{module.config.model_type}.")
        short = short.replace(_MISSPELLED, "vision_model.post_layernorm.")
        inside = short.startswith(("vision_model.", "embeddings.", "encoder."))
        unused = short.endswith((".position_ids", ".mask_token"))
        if short in own or (inside and not unused):
            adapted[short] = tensor
    kept = {id(tensor) for tensor in adapted.values()}
    dropped = tuple(name for name, tensor in state_dict.items() if id(tensor) not in kept)
    positions = next((name for name in own if "position_embedding" in name), None)
    if positions is not None:
        num_prefix = 2 if module.config.model_type == "deit" else 1
        fit_positions(adapted, positions, own[positions], num_prefix)
    return FittedLayout(adapted, dropped)


# --- open_clip ----------------------------------------------------------------------------------


def _open_clip(
    config: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    image_size: int | None = None,
    feature: str = "projected",
) -> Tower:
    from open_clip.model import _build_vision_tower  # public functions also build a text tower

    if config is None:
        config = open_clip_config(architecture or "")
    if "embed_dim" not in config or "vision_cfg" not in config:
        raise EncoderError(
            f"encoder of open_clip: expected embed_dim and vision_cfg, found {sorted(config)}"
        )
    kept = {k: config[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in config}
    kept = json.loads(json.dumps(kept))
    if image_size is not None:
        kept["vision_cfg"]["image_size"] = image_size
    module = _build_vision_tower(
        kept["embed_dim"], dict(kept["vision_cfg"]), bool(kept.get("quick_gelu"))
    )
    return open_clip_tower(module.eval(), kept, feature)


def open_clip_tower(module: Any, config: Mapping[str, Any], feature: str) -> Tower:
    """Wraps an image tower of open_clip.

    Args:
        module: The network; its projection is removed for `class`.
        config: `embed_dim`, `vision_cfg` and `quick_gelu`, from which it can be built again.
        feature: `projected`, or `class` for the normalised class token.

    Raises:
        EncoderError: If the network does not support the feature.
    """
    embed_dim = int(config["embed_dim"])
    if feature == "class":
        if not isinstance(getattr(module, "proj", None), nn.Parameter):
            raise EncoderError(
                f"feature 'class': {type(module).__name__} of open_clip has no projection to leave "
                "out; use feature='projected'"
            )
        embed_dim = len(module.proj)
        module.proj = None
    elif feature != "projected":
        raise EncoderError(f"feature {feature!r} of open_clip: expected projected or class")
    kept = {k: config[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in config}
    description = {"library": "open_clip", "config": kept, "feature": feature}
    return Tower(module, Call(module), embed_dim, feature, description)


def open_clip_config(architecture: str) -> dict[str, Any]:
    """Returns open_clip's config of an architecture.

    Raises:
        EncoderError: If the architecture is unknown. The message suggests similar ones.
    """
    import open_clip

    found = open_clip.get_model_config(architecture)
    if found is not None:
        return dict(found)
    known = open_clip.list_models()
    openai = f"{architecture.replace('/', '-')}-quickgelu"
    if openai in known:
        # OpenAI's weights need QuickGELU; with the architecture of the plain name they load, but
        # give different features.
        near = f"; OpenAI's CLIP is {openai!r}"
    else:
        near = did_you_mean(architecture, known)
    raise EncoderError(
        f"encoder open_clip:{architecture}: open_clip has no architecture {architecture}{near}"
    )


def check_quick_gelu(
    config: Mapping[str, Any], architecture: str, weights: object, name: str
) -> None:
    """Checks that an architecture of open_clip has the activation of OpenAI's weights.

    They load with GELU, too, but features are others.

    Raises:
        EncoderError: If its config lacks `quick_gelu`.
    """
    if not config.get("quick_gelu"):
        raise EncoderError(
            f"encoder {name}: weights {weights} were trained with QuickGELU, which {architecture} "
            f"lacks, so features would differ; use {architecture}-quickgelu, or a config with "
            "quick_gelu: true"
        )


def fit_open_clip(state_dict: Mapping[str, Tensor], module: Any) -> FittedLayout:
    """Extracts the image tower from a checkpoint of a whole CLIP with OpenAI's names."""
    inside = {
        name.removeprefix("visual."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("visual.")
    }
    adapted = inside or dict(state_dict)
    if getattr(module, "proj", 0) is None:
        adapted.pop("proj", None)
    if isinstance(positions := getattr(module, "positional_embedding", None), Tensor):
        fit_positions(adapted, "positional_embedding", positions, 1)
    outside = [n for n in state_dict if inside and not n.startswith("visual.")]
    return FittedLayout(adapted, tuple(outside))


_BUILDERS: dict[str, Callable[..., Tower]] = {
    "timm": _timm,
    "own": _own,
    "transformers": _transformers,
    "open_clip": _open_clip,
}
_FITS: dict[str, Callable[[Mapping[str, Tensor], nn.Module], FittedLayout]] = {
    "timm": fit_layout,
    "own": fit_layout,
    "transformers": fit_transformers,
    "open_clip": fit_open_clip,
}

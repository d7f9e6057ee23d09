"""Opens image encoders by name, or builds them from a description.

Names are those of `pathcore.encoders`, descriptions those of `pathcore.encoders.towers`. In
addition, `{"library": "mm", ...}` describes the ViT of MMClassification and MMPreTrain.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cite.conversions import clip_vision_from_hf
from cite.encoders.base import Encoder
from pathcore.encoders.encoder import EncoderName, open_image_tower
from pathcore.encoders.presets import get_preset
from pathcore.encoders.towers import VISION_TYPES, EncoderError, Tower, build_tower, open_tower
from pathcore.files import sha256_of
from pathcore.weights import read_state_dict

_PUBLISHED = "model."
"""Prefix of the image tower within the backbone in checkpoints of the published code."""

_PROMPTS = ("backbone.prompt", "backbone.prompt_initialised")


def open_encoder(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    feature: str | None = None,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> Encoder:
    """Opens an encoder by name; see `pathcore.encoders.create_encoder` for arguments and errors.

    For open_clip with a file of weights, the text tower is not built.
    """
    parsed = EncoderName.parse(name)
    given = weights if weights is not None else parsed.weights
    architecture = parsed.model if parsed.library == "open_clip" else ""
    if parsed.library == "preset" and (preset := get_preset(parsed.model)).library == "open_clip":
        architecture = preset.architecture
    if architecture and ":" not in architecture and given and Path(given).is_file():
        description = {"library": "open_clip", "architecture": architecture, **arguments}
        encoder = build_encoder(description | ({"feature": feature} if feature else {}), given)
        return _identified(encoder, name, (Path(given),))
    tower = open_image_tower(
        name, weights, feature=feature, trust_remote_code=trust_remote_code, **arguments
    )
    return _identified(_as_encoder(tower, has_weights=True), name, tower.files)


def _identified(encoder: Encoder, name: str, files: Iterable[Path]) -> Encoder:
    digest = " ".join(sha256_of(file) for file in files)
    encoder.identity = {"encoder": name.partition("@")[0], "digest": digest}
    return encoder


def build_encoder(
    description: Mapping[str, Any], checkpoint: str | os.PathLike[str] | None = None
) -> Encoder:
    """Builds an encoder from its description.

    Args:
        description: `library` with its arguments, see `pathcore.encoders.towers`; or `mm` with the
            arguments of `cite.encoders.vit.ViTEncoder`.
        checkpoint: File with the weights of the encoder, or checkpoint of a classifier with such an
            encoder; random weights if None.

    Raises:
        EncoderError: If library or model are unknown.
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If names or shapes do not fit.

    Example:
        >>> import torch
        >>> description = {"library": "mm", "arch": "deit-tiny", "img_size": 32}
        >>> build_encoder(description).features(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 192])
    """
    weights = None if checkpoint is None else only_backbone(read_state_dict(checkpoint))
    if description.get("library") == "mm":
        from cite.encoders.vit import ViTEncoder

        arguments = {k: v for k, v in description.items() if k != "library"}
        return ViTEncoder(**arguments, weights=weights, source=str(checkpoint))
    if weights is None:
        return _as_encoder(build_tower(description), has_weights=False)
    if description.get("library") == "open_clip" and any(
        name.startswith("vision_model.") for name in weights
    ):
        weights = clip_vision_from_hf(weights)
    tower = open_tower(
        description,
        weights,
        name=str(description.get("architecture") or description.get("library")),
        source=str(checkpoint),
    )
    return _as_encoder(tower, has_weights=True)


def _as_encoder(tower: Tower, *, has_weights: bool) -> Encoder:
    from cite.encoders.plain import OpenClipViT, TimmViT, TransformersViT

    module: Any = tower.module
    library = tower.description.get("library")
    kind = Encoder
    if library == "timm" and TimmViT.takes(module) and tower.feature != "layer3":
        kind = TimmViT
    elif library == "open_clip" and OpenClipViT.takes(module):
        kind = OpenClipViT
    elif library == "transformers" and module.config.model_type in VISION_TYPES:
        kind = TransformersViT
    return kind(tower, has_weights=has_weights)


def only_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the encoder from the checkpoint of a classifier; returns others unchanged."""
    if not any(name.startswith("backbone.") for name in state_dict):
        return dict(state_dict)
    return {
        name.removeprefix("backbone.").removeprefix(_PUBLISHED): tensor
        for name, tensor in state_dict.items()
        if name.startswith("backbone.") and name not in _PROMPTS
    }


__all__ = ["EncoderError", "build_encoder", "only_backbone", "open_encoder"]

"""Image models that take no prompts, used as they are: CTransPath, Swin, ResNet and others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cite.blocks import Block
from cite.encoders.base import Encoder
from pathcore.encoders.layouts import fit_layout
from pathcore.encoders.networks import NETWORKS

_log = logging.getLogger(__name__)


class WholeEncoder(Encoder):
    """A model of timm, or a network of `pathcore.encoders`, whose pooled output is the features.

    It is not taken apart into blocks, so prompts cannot enter it; it serves the linear, LoRA and
    fine-tuned baselines and zero-shot.

    Args:
        model: `ctranspath`, `keep`, or a name that timm knows. The weights are random.
        model_args: Arguments of `timm.create_model`.

    Raises:
        ValueError: If there is no such model.

    Example:
        >>> import torch
        >>> encoder = WholeEncoder("resnet18")
        >>> encoder.pool(encoder.embed(torch.zeros(2, 3, 64, 64))).shape
        torch.Size([2, 512])
    """

    def __init__(self, model: str, model_args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        import timm

        arguments = {"num_classes": 0, **(model_args or {})}
        # Through JSON, as a config file and an exported classifier would give it.
        stored = json.loads(json.dumps(arguments))
        self.spec = {"kind": "whole", "model": model, "model_args": stored}
        if model in NETWORKS:
            self.model = NETWORKS[model](**arguments)
        elif timm.is_model(model):
            self.model = timm.create_model(model, pretrained=False, **arguments)
        else:
            near = ", ".join(timm.list_models(f"*{model[:8]}*")[:3])
            raise ValueError(
                f"model {model!r}: one of {', '.join(NETWORKS)} or a model of timm expected"
                + (f"; near: {near}" if near else "")
            )
        self.width = self.embed_dim = int(self.model.num_features)
        embedding: Any = getattr(self.model, "patch_embed", None)
        if getattr(embedding, "strict_img_size", False) or model == "ctranspath":
            # Swin's windows and relative positions are built for one size.
            self.image_size = tuple(embedding.img_size)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to features `(B, E)`."""
        features: Tensor = self.model(pixel_values)
        return features

    def blocks(self) -> Sequence[Block]:
        """Returns none: the model is not taken apart."""
        return ()

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Returns the features as they are."""
        return hidden_states

    def adapt_checkpoint(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives published weights timm's names and drops what only training needs."""
        fitted = fit_layout(state_dict, self.model)
        if dropped := fitted.describe():
            _log.warning("%s: dropped %s", self.spec["model"], dropped)
        return dict(fitted.state_dict)

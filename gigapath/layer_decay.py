"""Learning rates by layer and over time, as published for fine-tuning.

Layer-wise decay: the classifier learns at the full rate, each layer below at `layer_decay` times
that of the one above (BEiT, https://arxiv.org/abs/2106.08254, appendix). Over time: linear warm-up,
then half a cosine, set anew for each step of the optimiser (MAE, https://arxiv.org/abs/2111.06377).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

PROTOCOLS = ("corrected", "published")

_ENCODER = "slide_encoder."
_LAYERS = f"{_ENCODER}encoder.layers."


def layer_id(name: str, depth: int, *, protocol: str = "corrected") -> int:
    """Number of the layer that a parameter counts to: 0 the embedding, depth + 1 the top.

    The original compares with a prefix that the parameter's name does not have, so that the
    embedding's projection learns at the full rate; `protocol="published"` does that too.

    Args:
        name: Of the parameter, from the classifier down.
        depth: Layers of the slide encoder.
        protocol: `corrected` or `published`.
    """
    if "cls_token" in name or "pos_embed" in name:
        return 0
    if name.startswith(f"{_ENCODER}patch_embed.") and protocol == "corrected":
        return 0
    if name.startswith(_LAYERS):
        return int(name.removeprefix(_LAYERS).split(".")[0]) + 1
    return depth + 1


def scale_and_decay(
    model: nn.Module,
    depth: int,
    *,
    weight_decay: float,
    layer_decay: float,
    protocol: str = "corrected",
) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate and weight decay of each trained parameter.

    The factor is `layer_decay ** (depth + 1 - layer)`; vectors (norms and biases) do not decay.
    """
    return {
        name: (
            layer_decay ** (depth + 1 - layer_id(name, depth, protocol=protocol)),
            0.0 if parameter.ndim == 1 else weight_decay,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def parameter_groups(
    model: nn.Module, settings: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Groups for an optimiser, one per pair of factor (`lr_scale`) and weight decay.

    Args:
        model: The model.
        settings: What `scale_and_decay` returned.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in settings:
            groups.setdefault(settings[name], []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def learning_rate(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: int
) -> float:
    """The rate at a point in time, `epoch` counting from 0 with fractions; the first step has 0.

    Args:
        epoch: Batches that were seen, in epochs.
        lr: At the end of the warm-up.
        min_lr: At the end.
        warmup_epochs: Length of the warm-up.
        epochs: Length of the training.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its share of a rate."""
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)

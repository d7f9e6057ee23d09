"""An optimizer that knows which part of the model a parameter belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import AdamW

PARTS = ("llm", "visual_encoder", "projector")
"""Children of the model, and the prefixes of its published checkpoints."""

_TAG = "pallava_part"


def tag_parameters(model: nn.Module, parts: Iterable[str]) -> None:
    """Marks the parameters of the named children, for `GroupedAdamW` to recognise."""
    for part in parts:
        for parameter in model.get_submodule(part).parameters():
            setattr(parameter, _TAG, part)


@OPTIMIZERS.register_module()
class GroupedAdamW(AdamW):
    """AdamW with a learning-rate factor for each part of the model.

    MMEngine's `paramwise_cfg` does the same by parameter names, but XTuner drops it when it hands
    over to DeepSpeed. Here the factor is part of the optimizer, which every engine keeps.

    Args:
        params: Parameters, tagged by `tag_parameters`; untagged ones have factor 1. Frozen ones
            are left out.
        lr: Base learning rate.
        lr_mult: Factor by part, for instance `{"projector": 0.5}`.
        kwargs: As for `torch.optim.AdamW`.

    Raises:
        ValueError: A part that no parameter belongs to, so that a misspelling cannot pass.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        lr_mult: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        factors = dict(lr_mult or {})
        by_factor: dict[float, list[Any]] = {}
        parts = set()
        for parameter in params:
            part = getattr(parameter, _TAG, None)
            parts.add(part)
            if parameter.requires_grad:
                by_factor.setdefault(factors.get(part, 1.0), []).append(parameter)
        unknown = sorted(set(factors) - parts)
        if unknown:
            raise ValueError(
                f"lr_mult names {', '.join(unknown)}, but the model's parts are "
                f"{', '.join(sorted(part for part in parts if part)) or 'not tagged'}"
            )
        groups = [
            {"params": parameters, "lr": lr * factor} for factor, parameters in by_factor.items()
        ]
        super().__init__(groups, lr=lr, **kwargs)

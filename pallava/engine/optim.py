"""Optimizer with a learning rate per part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import AdamW

PARTS = ("llm", "visual_encoder", "projector")
"""Children of the model, which are also the prefixes in published checkpoints."""

_TAG = "pallava_part"


def tag_parameters(model: nn.Module, parts: Iterable[str]) -> None:
    """Tags the parameters of the named children, so that `GroupedAdamW` can recognise them."""
    for part in parts:
        for parameter in model.get_submodule(part).parameters():
            setattr(parameter, _TAG, part)


@OPTIMIZERS.register_module()
class GroupedAdamW(AdamW):
    """AdamW with a learning-rate factor per part of the model.

    MMEngine's `paramwise_cfg` does the same by parameter names, but XTuner drops it under
    DeepSpeed. Here the factors are part of the optimizer, which every engine preserves.

    Args:
        params: Parameters tagged by `tag_parameters`; untagged ones have factor 1 and frozen ones
            are skipped.
        lr: Base learning rate.
        lr_mult: Factor by part, for instance `{"projector": 0.5}`.
        kwargs: Further arguments of `torch.optim.AdamW`.

    Raises:
        ValueError: If no parameter belongs to a part of `lr_mult`, which catches misspellings.

    Example:
        >>> model = nn.ModuleDict({"llm": nn.Linear(2, 2), "projector": nn.Linear(2, 2)})
        >>> tag_parameters(model, ["llm", "projector"])
        >>> optimizer = GroupedAdamW(model.parameters(), lr=1e-3, lr_mult={"projector": 0.5})
        >>> sorted(group["lr"] for group in optimizer.param_groups)
        [0.0005, 0.001]
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

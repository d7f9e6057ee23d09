"""Linear layer that maps image features to the space of the text embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INITIALISATIONS = ("identity", "normal", "normal_identity", "kaiming_uniform")
NORMAL_STD = 0.02
"""Standard deviation of normal initialisation in the published code
(github.com/Yunkun-Zhang/CITE)."""


class Projection(nn.Linear):
    """Linear layer with optional activations, `act_after(W act_before(x) + b)`.

    Args:
        in_features: Width of the image features.
        out_features: Width of the text embeddings.
        init: Initialisation of W: `identity` (rectangular), `normal`, `normal_identity` (normal
            plus identity), or `kaiming_uniform` as in torch. b is always uniform in
            +-1 / sqrt(in_features).
        act_before: Name of an activation class of `torch.nn`, or None.
        act_after: Name of an activation class of `torch.nn`, or None.

    Raises:
        ValueError: If initialisation or activation are unknown.

    Example:
        >>> Projection(512, 768)(torch.zeros(2, 512)).shape
        torch.Size([2, 768])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init: str = "normal_identity",
        act_before: str | None = None,
        act_after: str | None = None,
    ) -> None:
        if init not in INITIALISATIONS:
            raise ValueError(f"init {init!r}: expected one of {INITIALISATIONS}")
        self.init = init
        super().__init__(in_features, out_features)
        self.act_before = _activation(act_before)
        self.act_after = _activation(act_after)
        self.spec: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "init": init,
            "act_before": act_before,
            "act_after": act_after,
        }

    def reset_parameters(self) -> None:
        """Reinitialises weight and bias."""
        super().reset_parameters()
        with torch.no_grad():
            if self.init == "identity":
                nn.init.eye_(self.weight)
            elif self.init in ("normal", "normal_identity"):
                nn.init.normal_(self.weight, std=NORMAL_STD)
                if self.init == "normal_identity":
                    self.weight.diagonal().add_(1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps `(batch, in_features)` to `(batch, out_features)`.

        Raises:
            ValueError: If the features have another width.
        """
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"projection: features of width {features.shape[-1]} arrive, in_features is "
                f"{self.in_features}; set in_features to the encoder's embed_dim"
            )
        return self.act_after(super().forward(self.act_before(features)))


def _activation(name: str | None) -> nn.Module:
    if name is None:
        return nn.Identity()
    kind = getattr(nn, name, None)
    if kind is None or not issubclass(kind, nn.Module):
        raise ValueError(f"activation {name!r}: expected the name of a class of torch.nn")
    return kind()

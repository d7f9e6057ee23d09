"""What a prompted encoder needs to know of a vision transformer.

Shapes: B images, T tokens of an image, D width, E features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cite.blocks import Block


class Encoder(nn.Module, ABC):
    """A vision transformer taken apart: embedding, blocks, pooling.

    Dropout and stochastic depth are not applied: encoders here are frozen, or fine-tuned from
    weights whose recipes have none.

    Attributes:
        model: The library's module, whose parameter names are those of its checkpoints.
        width: D.
        embed_dim: E.
        num_prefix: Class and register tokens, before the patches.
        pools_class_token: Whether the features depend on the class token of the last block alone.
        image_size: Height and width of the only images that it takes; None if it takes others, or
            its library checks.
        lora_targets: Names of the linear layers that LoRA adapts by default.
        spec: Description from which `build_encoder` builds it again, as JSON values.
    """

    model: Any
    width: int
    embed_dim: int
    num_prefix: int = 1
    pools_class_token: bool = True
    image_size: tuple[int, int] | None = None
    lora_targets: Sequence[str] = ()
    spec: dict[str, Any]

    @abstractmethod
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to what the first block takes."""

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Returns the blocks, as views of the model's modules."""

    @abstractmethod
    def pool(self, hidden_states: Tensor) -> Tensor:
        """Maps the last block's output to features `(B, E)`.

        It is `(B, T, D)`, or `(B, 1, D)` where the class token alone was computed.
        """

    def adapt_checkpoint(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives a checkpoint of the family the model's names and sizes."""
        return dict(state_dict)


def resize_positions(positions: Tensor, num_positions: int, num_prefix: int) -> Tensor:
    """Interpolates position embeddings of a square grid to another square grid (bicubic).

    Args:
        positions: `(..., num_prefix + side**2, D)`.
        num_positions: The number wanted, prefix included.
        num_prefix: Leading embeddings that are kept.

    Raises:
        ValueError: One of the two grids is not square.
    """
    found, wanted = positions.shape[-2] - num_prefix, num_positions - num_prefix
    sides = [round(max(n, 0) ** 0.5) for n in (found, wanted)]
    if [side**2 for side in sides] != [found, wanted] or not min(sides):
        raise ValueError(
            f"position embeddings: cannot fit {found} positions to {wanted}, both must be squares"
        )
    prefix, grid = positions[..., :num_prefix, :], positions[..., num_prefix:, :]
    grid = grid.reshape(1, sides[0], sides[0], -1).permute(0, 3, 1, 2).float()
    grid = nn.functional.interpolate(
        grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False, antialias=True
    )
    grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([prefix, grid.reshape(*positions.shape[:-2], wanted, -1)], dim=-2)


def fit_positions(state_dict: dict[str, Tensor], name: str, like: Tensor, num_prefix: int) -> None:
    """Resizes the position embeddings of a checkpoint in place if their number differs."""
    positions = state_dict.get(name)
    if positions is None or positions.shape == like.shape:
        return
    same_width = positions.shape[-1] == like.shape[-1] and positions.dim() == like.dim()
    if same_width:
        state_dict[name] = resize_positions(positions, like.shape[-2], num_prefix)

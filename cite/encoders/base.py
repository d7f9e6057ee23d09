"""What a prompted encoder needs to know of a vision transformer.

Shapes: B images, T tokens of an image, D width, E features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cite.blocks import Block
from pathcore.encoders.towers import Tower


class Encoder(nn.Module):
    """An image tower as it is; subclasses take vision transformers apart for prompts.

    Dropout and stochastic depth are not applied within blocks: encoders here are frozen, or
    fine-tuned from weights whose recipes have none.

    Args:
        tower: The network and how its output is read.
        has_weights: Whether its weights were loaded from where they can be loaded again.

    Attributes:
        model: The library's module, whose parameter names are those of its checkpoints.
        width: D.
        embed_dim: E.
        num_prefix: Class and register tokens, before the patches.
        pools_class_token: Whether the features depend on the class token of the last block alone.
        image_size: Height and width of the only images that it takes; None if it takes others, or
            its library checks.
        lora_targets: Names of the layers that LoRA adapts by default; empty for all linear ones.
        identity: Name and SHA-256 of the weights, where it was opened by name.
        spec: Description from which `build_encoder` builds it again, as JSON values.
    """

    model: Any
    width: int
    num_prefix: int = 1
    pools_class_token: bool = True
    image_size: tuple[int, int] | None = None
    lora_targets: Sequence[str] = ()

    def __init__(self, tower: Tower, *, has_weights: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.model = tower.module
        self.embed_dim = self.width = tower.embed_dim
        self.spec: dict[str, Any] = dict(tower.description)
        self.has_weights = has_weights
        self.identity: dict[str, str] = {}
        embedding: Any = getattr(self.model, "patch_embed", None)
        if embedding is not None and getattr(embedding, "strict_img_size", True):
            # Positions, and Swin's windows, are built for one size.
            self.image_size = getattr(embedding, "img_size", None)

    def take_apart(self) -> None:
        """Makes `blocks` possible; nothing else of the model may be called afterwards."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to `(B, E)` as the library computes it."""
        return self.tower.features(pixel_values)

    def blocks(self) -> Sequence[Block]:
        """Returns the blocks, as views of the model's modules; none where it is no plain ViT."""
        return ()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to what the first block takes."""
        raise NotImplementedError

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Maps the last block's output to features `(B, E)`.

        It is `(B, T, D)`, or `(B, 1, D)` where the class token alone was computed.
        """
        raise NotImplementedError

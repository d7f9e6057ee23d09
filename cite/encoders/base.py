"""Base class of encoders: the interface that prompting needs.

Shapes: B images, T tokens of an image, D width, E features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cite.blocks import Block
from pathcore.encoders.towers import Tower


class Encoder(nn.Module):
    """An image tower that is called as a whole; subclasses split it into blocks for prompting.

    Dropout and stochastic depth are not applied within blocks: encoders are frozen, or fine-tuned
    from weights whose recipes do not use them.

    Args:
        tower: The network and its pooling.
        has_weights: Whether its weights were loaded from a source and can be loaded again.

    Attributes:
        model: The module of the library, with the parameter names of its checkpoints.
        width: Width D of the tokens.
        embed_dim: Length E of the features.
        num_prefix: Number of class and register tokens before the patch tokens.
        pools_class_token: Whether features depend only on the class token of the last block.
        image_size: Height and width of images if they are fixed; None if other sizes are possible
            or the library checks them.
        lora_targets: Names of layers that LoRA adapts by default; empty for all linear layers.
        identity: Name and SHA-256 of the weights if the encoder was opened by name, else empty.
        spec: Description from which `build_encoder` builds the encoder again, as JSON values.
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
            # Position embeddings, and the windows of Swin, are built for one size.
            self.image_size = getattr(embedding, "img_size", None)

    def take_apart(self) -> None:
        """Prepares the model for `blocks`; its own `forward` must not be called afterwards."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to features `(B, E)`, by the library."""
        return self.tower.features(pixel_values)

    def blocks(self) -> Sequence[Block]:
        """Returns the blocks as views of the model's modules; empty if it is not a plain ViT."""
        return ()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised images `(B, 3, height, width)` to tokens `(B, T, D)`."""
        raise NotImplementedError

    def pool(self, hidden_states: Tensor) -> Tensor:
        """Maps the output of the last block to features `(B, E)`.

        Args:
            hidden_states: `(B, T, D)`, or `(B, 1, D)` if only the class token was computed.
        """
        raise NotImplementedError

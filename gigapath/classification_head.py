"""Linear classifier on the slide encoder, with the published names and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gigapath import slide_encoder
from pathcore.files import StrPath


def parse_layers(feat_layer: str | int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Parses layer numbers as the published scripts write them: joined by `-`, not a range.

    Args:
        feat_layer: Layer numbers; 0 is the input embedding, i the output of layer i.
        depth: Number of layers of the encoder.

    Raises:
        ValueError: If `feat_layer` cannot be parsed, or the encoder has no such layer.

    Example:
        >>> parse_layers("5-11", depth=12), parse_layers(11, depth=12)
        ((5, 11), (11,))
    """
    parts = feat_layer.split("-") if isinstance(feat_layer, str) else feat_layer
    try:
        layers = tuple(int(p) for p in (parts if not isinstance(parts, int) else [parts]))
    except (TypeError, ValueError):
        layers = ()
    if not layers or not all(0 <= layer <= depth for layer in layers):
        raise ValueError(
            f"feat_layer {feat_layer!r}: expected layers from 0 (embedding) to {depth} (last), "
            "joined by '-'"
        )
    return layers


class ClassificationHead(nn.Module):
    """Slide encoder with a linear layer that classifies slides.

    Args:
        input_dim: Width of the tile embeddings.
        latent_dim: Expected width of the encoder; 0 accepts any.
        feat_layer: Layers whose embeddings are concatenated, such as `"11"` or `"5-11"`.
        n_classes: Number of outputs.
        model_arch: Architecture of the encoder.
        pretrained: Weights of the encoder; see `gigapath.slide_encoder.create_model`.
        freeze: Whether to train only the classifier.
        **kwargs: Further arguments of the encoder, for instance `global_pool` or `dropout`.

    Raises:
        ValueError: If the encoder has no such layer or another width, or the weights do not fit.

    Example:
        >>> import torch
        >>> model = ClassificationHead(
        ...     384, n_classes=3, model_arch="gigapath_slide_enc12l384d", pretrained=""
        ... )
        >>> coords = 256 * torch.arange(40).reshape(1, 20, 2)
        >>> model(torch.zeros(1, 20, 384), coords).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int = 0,
        feat_layer: str | int | Sequence[int] = "11",
        n_classes: int = 2,
        model_arch: str = "gigapath_slide_enc12l768d",
        pretrained: StrPath = "hf_hub:prov-gigapath/prov-gigapath",
        freeze: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        encoder = slide_encoder.create_model(pretrained, model_arch, input_dim, **kwargs)
        if latent_dim and latent_dim != encoder.embed_dim:
            raise ValueError(
                f"latent_dim {latent_dim}: {model_arch} has {encoder.embed_dim}; omit latent_dim"
            )
        self.slide_encoder = encoder
        self.feat_layer = parse_layers(feat_layer, encoder.depth)
        self.feat_dim = len(self.feat_layer) * encoder.embed_dim
        self.freeze = freeze
        encoder.requires_grad_(not freeze)
        self.classifier = nn.Sequential(nn.Linear(self.feat_dim, n_classes))
        self.train()

    def train(self, mode: bool = True) -> ClassificationHead:
        """Sets the training mode; a frozen encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.freeze:
            self.slide_encoder.eval()
        return self

    def forward(
        self,
        images: Tensor,
        coords: Tensor,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Classifies slides.

        Args:
            images: Tile embeddings `(num_slides, num_tiles, input_dim)`, or
                `(num_tiles, input_dim)` for a single slide.
            coords: `(num_slides, num_tiles, 2)`, x and y in level-0 pixels.
            lengths: Number of tiles per slide; the rest is padding.

        Returns:
            Logits `(num_slides, n_classes)`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            vectors = self._vectors(images, coords, lengths)
        logits: Tensor = self.classifier(vectors)
        return logits

    def _vectors(self, images: Tensor, coords: Tensor, lengths: Sequence[int] | None) -> Tensor:
        encoder = self.slide_encoder
        if len(self.feat_layer) == 1:  # `embed` does not run the layers above
            pooling = "mean" if encoder.global_pool else "cls"
            return encoder.embed(images, coords, self.feat_layer[0], pooling, lengths=lengths)  # type: ignore[arg-type]
        layers = encoder(images, coords, all_layer_embed=True, lengths=lengths)
        return torch.cat([layers[number] for number in self.feat_layer], dim=-1)


def get_model(**kwargs: Any) -> ClassificationHead:
    """Builds a `ClassificationHead`, under the name that the published scripts use."""
    return ClassificationHead(**kwargs)

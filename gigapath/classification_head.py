"""A linear classifier over layers of the slide encoder; names and arguments as published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gigapath import slide_encoder


def parse_layers(feat_layer: str | int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers as numbers: `"11"`, `"5-11"`, 11 or `[5, 11]`.

    Args:
        feat_layer: 0 is the embedding, i the output of layer i; `depth` is the last.
        depth: Layers of the encoder.

    Raises:
        ValueError: No such layer.
    """
    parts = feat_layer.split("-") if isinstance(feat_layer, str) else feat_layer
    try:
        layers = tuple(int(p) for p in (parts if not isinstance(parts, int) else [parts]))
    except (TypeError, ValueError):
        layers = ()
    if not layers or not all(0 <= layer <= depth for layer in layers):
        raise ValueError(
            f"feat_layer {feat_layer!r}: layers from 0 (embedding) to {depth} (last), joined by "
            "'-', expected"
        )
    return layers


class ClassificationHead(nn.Module):
    """Logits of slides.

    Args:
        input_dim: Width of the tile embeddings.
        latent_dim: Width of the encoder; 0 takes what it has.
        feat_layer: Layers whose vectors are joined, such as `"11"` or `"5-11"`.
        n_classes: Outputs.
        model_arch: Size of the encoder.
        pretrained: Its weights, as `gigapath.slide_encoder.create_model` takes them.
        freeze: Train the classifier alone.
        **kwargs: Further arguments of the encoder, for instance `global_pool`, `dropout`.

    Raises:
        ValueError: A layer or a width that the encoder does not have.
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int = 0,
        feat_layer: str | int | Sequence[int] = "11",
        n_classes: int = 2,
        model_arch: str = "gigapath_slide_enc12l768d",
        pretrained: str | os.PathLike[str] = "hf_hub:prov-gigapath/prov-gigapath",
        freeze: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        encoder = slide_encoder.create_model(pretrained, model_arch, input_dim, **kwargs)
        if latent_dim and latent_dim != encoder.embed_dim:
            raise ValueError(
                f"latent_dim {latent_dim}: {model_arch} has {encoder.embed_dim}; leave it out"
            )
        self.slide_encoder = encoder
        self.feat_layer = parse_layers(feat_layer, encoder.depth)
        self.feat_dim = len(self.feat_layer) * encoder.embed_dim
        self.freeze = freeze
        encoder.requires_grad_(not freeze)
        self.classifier = nn.Sequential(nn.Linear(self.feat_dim, n_classes))
        self.train()

    def train(self, mode: bool = True) -> ClassificationHead:
        """Switches dropout; a frozen encoder never drops."""
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
            images: `(num_slides, num_tiles, input_dim)`, or `(num_tiles, input_dim)` of one.
            coords: `(num_slides, num_tiles, 2)`, x and y in pixels at level 0.
            lengths: Tiles of each slide; the rest is padding.

        Returns:
            `(num_slides, n_classes)`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            vectors = self._vectors(images, coords, lengths)
        logits: Tensor = self.classifier(vectors)
        return logits

    def _vectors(self, images: Tensor, coords: Tensor, lengths: Sequence[int] | None) -> Tensor:
        encoder = self.slide_encoder
        if len(self.feat_layer) == 1:  # layers above are not run
            pooling = "mean" if encoder.global_pool else "cls"
            return encoder.embed(images, coords, self.feat_layer[0], pooling, lengths=lengths)  # type: ignore[arg-type]
        layers = encoder(images, coords, all_layer_embed=True, lengths=lengths)
        return torch.cat([layers[number] for number in self.feat_layer], dim=-1)


def get_model(**kwargs: Any) -> ClassificationHead:
    """`ClassificationHead`, by the name of the original's function."""
    return ClassificationHead(**kwargs)

"""Scores classes by the similarity of image features to the text embeddings of the classes.

Shapes: B images, S texts, C classes, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cite.text_embeddings import TextEmbeddings

TEMPERATURE = 4.6052
"""ln 100, the largest log scale of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.5)."""

SEVERAL = ("mean", "max")


class TextScores(nn.Module):
    """Computes exp(temperature) times the cosine similarity of features and text embeddings.

    The embeddings are a buffer, so they move with the module and are part of its state dict.

    Args:
        texts: Embeddings, with the class of each.
        temperature: Logarithm of the scale.
        learnable_temperature: Whether the temperature is trained; otherwise it is a buffer.
        several: For classes with several texts, `mean` uses the mean of their normalised
            embeddings, `max` the text that is most similar to the image.

    Raises:
        ValueError: If `several` is unknown.

    Example:
        >>> texts = TextEmbeddings(
        ...     torch.eye(3, 512), torch.tensor([0, 1, 1]), ("normal", "tumour"), ("a", "b", "c")
        ... )
        >>> TextScores(texts)(torch.ones(4, 512)).shape
        torch.Size([4, 2])
    """

    text_embeddings: Tensor
    class_ids: Tensor
    temperature: Tensor

    def __init__(
        self,
        texts: TextEmbeddings,
        temperature: float = TEMPERATURE,
        learnable_temperature: bool = False,
        several: str = "mean",
    ) -> None:
        super().__init__()
        if several not in SEVERAL:
            raise ValueError(f"several {several!r}: expected one of {SEVERAL}")
        self.classes = list(texts.classes)
        self.several = several
        self.learnable_temperature = learnable_temperature
        embeddings, class_ids = texts.embeddings.float(), texts.class_ids
        if several == "mean":
            embeddings = torch.stack(
                [
                    F.normalize(embeddings[class_ids == index], dim=-1).mean(dim=0)
                    for index in range(len(self.classes))
                ]
            )
            class_ids = torch.arange(len(self.classes))
        # A buffer; in the published code it neither moves with the model nor is in checkpoints.
        self.register_buffer("text_embeddings", embeddings)
        self.register_buffer("class_ids", class_ids, persistent=False)
        value = torch.tensor(float(temperature))
        if learnable_temperature:
            self.temperature = nn.Parameter(value)
        else:
            self.register_buffer("temperature", value)

    @property
    def spec(self) -> dict[str, Any]:
        """Description as JSON values, without the embeddings, which are in the state dict."""
        return {
            "classes": self.classes,
            "class_ids": self.class_ids.tolist(),
            "width": self.text_embeddings.shape[1],
            "learnable_temperature": self.learnable_temperature,
            "several": self.several,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TextScores:
        """Builds a module whose embeddings must be loaded from a state dict afterwards."""
        class_ids = torch.tensor(spec["class_ids"])
        texts = TextEmbeddings(
            embeddings=torch.ones(len(class_ids), spec["width"]),
            class_ids=class_ids,
            classes=tuple(spec["classes"]),
            texts=("",) * len(class_ids),
        )
        return cls(
            texts, learnable_temperature=spec["learnable_temperature"], several=spec["several"]
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps features `(B, D)` to float32 scores `(B, C)`; see `compare`."""
        return self.compare(features, self.text_embeddings)

    def compare(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Compares features with text embeddings.

        Args:
            features: `(B, D)`.
            embeddings: `(S, D)`, with the classes of the module's own.

        Returns:
            float32 scores `(B, C)`.

        Raises:
            ValueError: If features and text embeddings have different widths.
        """
        width = embeddings.shape[1]
        if features.shape[-1] != width:
            raise ValueError(
                f"features of width {features.shape[-1]} meet text embeddings of width {width}; "
                f"put a ProjectionNeck with out_features={width} between them"
            )
        # In fp32, because the scale, usually 100, amplifies rounding errors of half precision.
        with torch.autocast(features.device.type, enabled=False):
            images = F.normalize(features.float(), dim=-1)
            texts = F.normalize(embeddings, dim=-1)
            scores = self.temperature.exp() * images @ texts.t()
        if self.several == "mean":
            return scores
        by_class = [
            scores[:, self.class_ids == index].amax(dim=1) for index in range(len(self.classes))
        ]
        return torch.stack(by_class, dim=1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Published checkpoints contain neither text embeddings nor a fixed temperature.
        for name, buffer in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

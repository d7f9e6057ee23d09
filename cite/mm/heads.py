"""Neck and head of CITE for MMPreTrain and MMClassification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from cite.mm.published import FLOAT16, published_arguments
from cite.mm.samples import labels_of, with_predictions
from cite.projection import Projection
from cite.text_embeddings import (
    TextEmbeddings,
    check_text_embeddings,
    read_text_embeddings,
    texts_by_class,
)
from cite.text_encoder import build_text_encoder
from cite.text_scores import TEMPERATURE, TextScores


@MODELS.register_module()
@published_arguments(FLOAT16)
class ProjectionNeck(Projection):
    """Neck that projects image features to the width of the text embeddings.

    Args:
        *arguments: Arguments of `cite.projection.Projection`.
        fix: Whether to freeze the initial weights.
        **named: Keyword arguments of `cite.projection.Projection`.
    """

    def __init__(self, *arguments: Any, fix: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.requires_grad_(not fix)

    def forward(self, features: Any) -> tuple[Tensor]:
        """Maps features to a tuple of one tensor `(batch, out_features)`.

        Args:
            features: `(batch, in_features)`, or a tuple that starts with it. It may also be a list
                of patch tokens and class token, as ViTs of the hosts return it; the class token is
                used then.
        """
        if isinstance(features, tuple):
            features = features[0]
        if isinstance(features, list):
            features = features[1]
        return (super().forward(features),)


@MODELS.register_module()
@published_arguments(
    {
        **FLOAT16,
        "learnable_t": "learnable_temperature",
        "text_feature_file": "text_embeddings, a file of `xtuner-add cite-texts`",
    }
)
class TextEmbeddingHead(TextScores):
    """Head that classifies by similarity to text embeddings; without a neck this is zero-shot.

    Args:
        text_embeddings: File of `xtuner-add cite-texts`.
        text_encoder: Arguments of `cite.text_encoder.build_text_encoder`, instead of a file.
        texts: One or more descriptions of each class for the text encoder, as a list in the order
            of the labels. A dict by class name needs `classes` for the order, because MMEngine
            sorts keys when it writes a config.
        templates: Texts with one `{}` each, for the text encoder.
        classes: Expected names of the classes, in order.
        temperature: Logarithm of the scale.
        learnable_temperature: Whether the temperature is trained.
        several: `mean` or `max` for classes with several texts, see `TextScores`.
        loss_weight: Factor of the cross-entropy.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If both or neither of file and encoder are given, or classes differ.
    """

    def __init__(
        self,
        text_embeddings: str | None = None,
        text_encoder: Mapping[str, Any] | None = None,
        texts: Sequence[Any] | Mapping[str, Any] | None = None,
        templates: Sequence[str] = ("{}",),
        classes: Sequence[str] | None = None,
        temperature: float = TEMPERATURE,
        learnable_temperature: bool = False,
        several: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        if (text_embeddings is None) == (text_encoder is None):
            raise ValueError(
                "TextEmbeddingHead: expected either `text_embeddings` (a file) or `text_encoder`"
            )
        if text_embeddings is not None:
            content = read_text_embeddings(text_embeddings, classes=classes)
        else:
            content = _encode(text_encoder or {}, _in_order(texts, classes), templates)
            check_text_embeddings(content, classes=classes)
        super().__init__(content, temperature, learnable_temperature, several)
        self.loss_weight = loss_weight

    def pre_logits(self, features: Any) -> Tensor:
        """Returns the features that are compared with the texts, the last of a tuple."""
        return features[-1] if isinstance(features, (tuple, list)) else features

    def forward(self, features: Any) -> Tensor:
        """Maps features, or a tuple that ends with them, to scores `(batch, num_classes)`."""
        return super().forward(self.pre_logits(features))

    def loss(self, features: Any, data_samples: Sequence[Any], **kwargs: Any) -> dict[str, Tensor]:
        """Returns the mean cross-entropy.

        Raises:
            ValueError: If a label is out of range.
        """
        scores = self(features)
        target = labels_of(data_samples).to(scores.device)
        if target.dim() == 1 and target.device.type == "cpu":
            _check_labels(target, len(self.classes), data_samples)
        return {"loss": self.loss_weight * F.cross_entropy(scores, target)}

    def predict(
        self, features: Any, data_samples: Sequence[Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Returns the samples with probabilities and predicted labels."""
        return with_predictions(self(features), data_samples)


def _in_order(
    texts: Sequence[Any] | Mapping[str, Any] | None, classes: Sequence[str] | None
) -> dict[str, Any]:
    if not texts:
        raise ValueError("TextEmbeddingHead: `text_encoder` needs `texts`: descriptions by class")
    if isinstance(texts, Mapping):
        if classes is None or set(classes) != set(texts):
            raise ValueError(
                f"TextEmbeddingHead: texts of {', '.join(texts)} need `classes` with these names "
                f"in the order of the labels, found {classes}; or give texts as a list"
            )
        return {name: texts[name] for name in classes}
    names = classes or [text if isinstance(text, str) else text[0] for text in texts]
    if len(set(names)) != len(texts):
        raise ValueError(
            f"TextEmbeddingHead: {len(texts)} texts; expected as many different classes, found "
            f"{', '.join(names)}"
        )
    return dict(zip(names, texts, strict=True))


def _encode(
    encoder: Mapping[str, Any], texts: Mapping[str, Any], templates: Sequence[str]
) -> TextEmbeddings:
    filled, class_ids = texts_by_class(texts, templates)
    model = build_text_encoder(**encoder)
    return TextEmbeddings(
        model.encode(filled),
        Tensor(class_ids).long(),
        tuple(texts),
        tuple(filled),
        model.description,
        "TextEmbeddingHead",
    )


def _check_labels(target: Tensor, num_classes: int, samples: Sequence[Any]) -> None:
    for label, sample in zip(target.tolist(), samples, strict=True):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{sample.get('img_path', 'a sample')}: label {label}, but the head has texts of "
                f"{num_classes} classes, 0 to {num_classes - 1}"
            )

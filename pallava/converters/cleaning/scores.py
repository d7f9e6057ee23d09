"""Models that score images for cleaning: image classifiers and CLIP-like encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pathcore.device_claims import choose_device
from pathcore.files import StrPath, file_identity

if TYPE_CHECKING:
    from torch import Tensor

    from pathcore.encoders import Encoder

_PACKAGE = "pallava.converters.cleaning.words"


class Classifier(Protocol):
    """Image classifier."""

    identity: str
    batch_size: int

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Returns the class indices of labels.

        Raises:
            ValueError: If the classifier lacks a label.
        """

    def probabilities(self, images: Sequence[Any]) -> list[list[float]]:
        """Returns a list of class probabilities per RGB image."""


class HFClassifier:
    """Image classifier of transformers.

    Args:
        name: Folder or Hub name.
        device: Device of the model. Defaults to the GPU if there is one.
        batch_size: Number of images per batch.
    """

    def __init__(self, name: str, *, device: str | None = None, batch_size: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from pathcore.weights import check_loading_report

        self.identity = _identity(name)
        self.batch_size = batch_size
        self.device = choose_device(device)
        self._processor = AutoImageProcessor.from_pretrained(
            name, use_fast=False, trust_remote_code=False
        )
        model, report = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )
        check_loading_report(report, model, what="classifier", source=name)
        self._model = model.to(self.device).eval()

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Returns the class indices of labels.

        Raises:
            ValueError: If `labels` is empty, or the model lacks a label.
        """
        known = {str(label): index for index, label in self._model.config.id2label.items()}
        unknown = [label for label in labels if label not in known]
        if unknown or not labels:
            raise ValueError(
                f"classifier {self.identity}: labels {', '.join(unknown) or '(none)'} asked for, "
                f"it has {', '.join(known)}"
            )
        return [int(known[label]) for label in labels]

    def probabilities(self, images: Sequence[Any]) -> list[list[float]]:
        """See `Classifier.probabilities`."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        return [list(map(float, row)) for row in logits.softmax(-1).cpu()]


class ClipScorer:
    """Image-text similarity and zero-shot classification with a two-tower encoder.

    Args:
        encoder: Image encoder with a text tower.
        batch_size: Number of images per batch.

    Raises:
        ValueError: If the encoder has no text tower.
    """

    def __init__(self, encoder: Encoder, *, batch_size: int = 32) -> None:
        if not encoder.has_text:
            raise ValueError(f"encoder {encoder.name}: has no text tower to compare images with")
        self.identity = f"{encoder.name} {encoder.digest}"
        self.scale = encoder.logit_scale
        self.batch_size = batch_size
        self._encoder = encoder
        self._classes: dict[tuple[str, ...], Tensor] = {}

    def similarities(self, images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        """Returns the cosine similarity of each image and its text."""
        image, text = self._encoder.encode_images(images), self._encoder.encode_texts(texts)
        return [float(value) for value in (image * text).sum(-1)]

    def class_probabilities(
        self, images: Sequence[Any], descriptions: Sequence[str]
    ) -> list[list[float]]:
        """Returns softmax probabilities over descriptions per image (arXiv:2103.00020, 3.1)."""
        key = tuple(descriptions)
        if key not in self._classes:
            self._classes[key] = self._encoder.encode_texts(descriptions)
        cosines = self._encoder.encode_images(images) @ self._classes[key].T
        return [list(map(float, row)) for row in (self.scale * cosines).softmax(-1)]


def load_clip_classes(path: StrPath | None = None) -> tuple[list[str], list[str]]:
    """Loads descriptions to keep and to drop, by default our own.

    The file is a JSON object `{"keep": [...], "drop": [...]}`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has another form.
    """
    source = resources.files(_PACKAGE) / "clip_classes.json" if path is None else Path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        keep, drop = list(content["keep"]), list(content["drop"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: expected lists keep and drop of descriptions") from error
    if not keep or not drop or not all(isinstance(text, str) for text in (*keep, *drop)):
        raise ValueError(f"{source}: expected at least one description to keep and one to drop")
    return keep, drop


def _identity(name: str) -> str:
    """Identifies a model by name, plus size and time of a file, to detect changed weights."""
    path = Path(name)
    files = (
        [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    )
    return " ".join([name, *(f"{size}:{time}" for _, size, time in map(file_identity, files))])

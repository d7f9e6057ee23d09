"""Exported classifiers: a safetensors file with a description, usable without MMEngine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cite.encoders import build_encoder
from cite.preprocessing import Preprocessing
from cite.projection import Projection
from cite.prompted import PromptedEncoder
from cite.text_scores import TextScores
from pathcore.device_claims import choose_device
from pathcore.encoders.transform import Transform
from pathcore.files import StrPath, read_json, write_json
from pathcore.images import load_image, to_rgb
from pathcore.weights import load_strict, read_state_dict, write_state_dict

WEIGHTS_NAME = "classifier.safetensors"
CONFIG_NAME = "classifier.json"
FORMAT = 2

Picture = Image.Image | np.ndarray[Any, Any] | StrPath


class LinearScores(nn.Module):
    """Linear classifier with the parameter names of the hosts' `LinearClsHead`.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Maps `(batch, in_features)` to scores `(batch, num_classes)`."""
        return self.fc(features)


class Classifier(nn.Module):
    """Encoder, neck, head and preprocessing of an adapted classifier.

    Args:
        backbone: The encoder, with LoRA merged.
        neck: Projection to the space of the text embeddings, or None.
        head: Maps features to scores.
        preprocessing: Maps images to the encoder's input.
        classes: Names of the classes, in the order of their labels.
        provenance: Origin of the classifier, as JSON values.

    Raises:
        ValueError: If the head scores another number of classes.
    """

    def __init__(
        self,
        backbone: PromptedEncoder,
        neck: Projection | None,
        head: TextScores | LinearScores,
        preprocessing: Preprocessing | Transform,
        classes: Sequence[str],
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        number = len(head.classes) if isinstance(head, TextScores) else head.fc.out_features
        if number != len(classes):
            raise ValueError(f"{len(classes)} names of classes, but the head scores {number}")
        self.backbone, self.neck, self.head = backbone, neck, head
        self.preprocessing = preprocessing
        self.classes = tuple(classes)
        self.provenance = dict(provenance or {})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps preprocessed images `(batch, 3, size, size)` to scores `(batch, num_classes)`."""
        features = self.backbone(pixel_values)
        return self.head(features if self.neck is None else self.neck(features))

    @torch.no_grad()
    def predict(self, images: Iterable[Picture], batch_size: int = 32) -> Tensor:
        """Returns the probabilities of images.

        Args:
            images: Pillow images, uint8 RGB `(height, width, 3)`, or paths.
            batch_size: Number of images per batch.

        Returns:
            float32 `(num_images, num_classes)` on the CPU.

        Raises:
            ValueError: If a file is not an image.
        """
        self.eval()
        device = next(self.parameters()).device
        rest = iter(images)
        rows = [torch.empty(0, len(self.classes))]
        while batch := list(islice(rest, batch_size)):
            pixels = torch.stack([self.preprocessing(open_image(image)) for image in batch])
            rows.append(self(pixels.to(device)).softmax(dim=1).float().cpu())
        return torch.cat(rows)

    def save(self, folder: StrPath) -> None:
        """Writes `classifier.safetensors`, then `classifier.json`, without which it cannot load."""
        folder = Path(folder)
        frozen = self.backbone.frozen_weights()
        state_dict = self.state_dict() | {f"backbone.{name}": t for name, t in frozen.items()}
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        write_state_dict(folder / WEIGHTS_NAME, state_dict)
        write_json(folder / CONFIG_NAME, self._describe())

    def _describe(self) -> dict[str, Any]:
        prompts, head = self.backbone.prompts, self.head
        is_text = isinstance(head, TextScores)
        return {
            "format": FORMAT,
            "classes": self.classes,
            "preprocessing": self.preprocessing.to_dict(),
            "encoder": self.backbone.encoder.spec,
            "precision": self.backbone.precision,
            "prompts": None if prompts is None else asdict(prompts.spec),
            "neck": None if self.neck is None else self.neck.spec,
            "head": {"kind": "text", **head.spec} if is_text else {"kind": "linear"},  # type: ignore[dict-item]
            "provenance": self.provenance,
        }


def load_classifier(folder: StrPath, device: str | torch.device = "cpu") -> Classifier:
    """Loads a classifier that `Classifier.save` wrote; needs neither MMEngine nor the hosts.

    Args:
        folder: Folder with `classifier.safetensors` and `classifier.json`.
        device: Device to run on.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the format is another version, weights do not fit the description, or there
            is no such device.

    Example:
        >>> classifier = load_classifier("exported")  # doctest: +SKIP
        >>> classifier.predict(["patch.jpg"])  # doctest: +SKIP
        tensor([[0.9, 0.1]])
    """
    place = choose_device(device)
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME, what="classifier")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected format {FORMAT}, found "
            f"{config.get('format')!r}; export the classifier again with this version"
        )
    prompts = config["prompts"] or {}
    names = {"length": "prompt_length", "layers": "prompt_layers", "position": "prompt_pos"}
    backbone = PromptedEncoder(
        build_encoder(config["encoder"]),
        **{argument: prompts[name] for name, argument in names.items() if name in prompts},
        prompt_init="zero",
        precision=config["precision"],
    )
    neck = Projection(**config["neck"]) if config["neck"] else None
    width = backbone.embed_dim if neck is None else neck.out_features
    head: TextScores | LinearScores
    if config["head"]["kind"] == "text":
        head = TextScores.from_spec(config["head"])
    else:
        head = LinearScores(width, len(config["classes"]))
    described = config["preprocessing"]
    kind = Transform if "resize_px" in described else Preprocessing
    preprocessing = kind.from_dict(described)
    provenance = config.get("provenance")
    model = Classifier(backbone, neck, head, preprocessing, config["classes"], provenance)
    weights = folder / WEIGHTS_NAME
    load_strict(model, read_state_dict(weights), what=CONFIG_NAME, source=str(weights))
    return model.eval().to(place)


def open_image(image: Picture) -> Image.Image:
    """Converts a path, Pillow image or array to an RGB image.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is none of these, or the file is not an image.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if (
            image.dtype != np.uint8
            or image.ndim not in (2, 3)
            or image.shape[2:] not in ((), (3,), (4,))
        ):
            raise ValueError(
                f"image: expected uint8 pixels (height, width, 3), found {image.dtype} "
                f"{image.shape}"
            )
        return to_rgb(Image.fromarray(image))
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            "image: expected a path, a PIL image or uint8 pixels (height, width, 3), found "
            f"{type(image).__name__}"
        )
    if not Path(image).is_file():
        raise FileNotFoundError(f"{image}: no such image file")
    return load_image(image)

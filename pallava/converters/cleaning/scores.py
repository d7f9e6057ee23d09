"""Models that look at images for the cleaning: a classifier, and a CLIP of open_clip or HF."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = "pallava.converters.cleaning.words"

_SCALE = 100.0
"""Temperature of zero-shot classification where a model states none (CLIP, arXiv:2103.00020)."""


class Classifier(Protocol):
    """Gives class probabilities of images."""

    identity: str
    batch_size: int

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Positions of labels; raises ValueError for one it does not have."""

    def probabilities(self, images: Sequence[Any]) -> list[list[float]]:
        """One list of probabilities per RGB image."""


class HFClassifier:
    """An image classifier of transformers.

    Args:
        name: Folder or hub name.
        device: By default the GPU, or the CPU.
        batch_size: Images at a time.
    """

    def __init__(self, name: str, *, device: str | None = None, batch_size: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.identity = _identity(name)
        self.batch_size = batch_size
        self.device = _device(device)
        self._processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
        self._model = AutoModelForImageClassification.from_pretrained(name).to(self.device).eval()

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Positions of labels.

        Raises:
            ValueError: None given, or one that the model does not have.
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
        """One list of probabilities per RGB image."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        return [list(map(float, row)) for row in logits.softmax(-1).cpu()]


class ClipScorer:
    """A CLIP model: similarity of images and texts, and zero-shot classes.

    Args:
        identity: The model's name, for reports.
        encode_images: RGB images to features `(batch, embed_dim)`.
        encode_texts: Texts to features `(batch, embed_dim)`.
        scale: What cosines are multiplied by before the softmax over classes.
        batch_size: Images at a time.
    """

    def __init__(
        self,
        identity: str,
        encode_images: Callable[[Sequence[Any]], Tensor],
        encode_texts: Callable[[Sequence[str]], Tensor],
        *,
        scale: float = _SCALE,
        batch_size: int = 32,
    ) -> None:
        self.identity = identity
        self.scale = scale
        self.batch_size = batch_size
        self._encode_images = encode_images
        self._encode_texts = encode_texts
        self._classes: dict[tuple[str, ...], Tensor] = {}

    def similarities(self, images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        """Cosine of each image with its text."""
        import torch

        with torch.inference_mode():
            image = _unit(self._encode_images(images))
            text = _unit(self._encode_texts(texts))
            return [float(value) for value in (image * text).sum(-1)]

    def class_probabilities(
        self, images: Sequence[Any], descriptions: Sequence[str]
    ) -> list[list[float]]:
        """Softmax over descriptions of each image's cosines (arXiv:2103.00020, section 3.1)."""
        import torch

        key = tuple(descriptions)
        with torch.inference_mode():
            if key not in self._classes:
                self._classes[key] = _unit(self._encode_texts(descriptions))
            cosines = _unit(self._encode_images(images)) @ self._classes[key].T
            return [list(map(float, row)) for row in (self.scale * cosines).softmax(-1)]


def load_clip(
    name: str,
    *,
    weights: str | None = None,
    device: str | None = None,
    batch_size: int = 32,
) -> ClipScorer:
    """Loads a CLIP model.

    Args:
        name: `hf:FOLDER` for transformers' CLIP, SigLIP and the like; otherwise a model name of
            open_clip, as `ViT-B-16` or `hf-hub:owner/name`.
        weights: For open_clip: a checkpoint file or the name of pretrained weights.
        device: By default the GPU, or the CPU.
        batch_size: Images at a time.

    Raises:
        ValueError: A model name of open_clip without weights.
    """
    if name.startswith("hf:"):
        return _hf_clip(name.removeprefix("hf:"), _device(device), batch_size)
    if weights is None and not name.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(
            f"CLIP {name}: weights expected, a file or one of open_clip's names; random ones would "
            "score at random"
        )
    return _open_clip(name, weights, _device(device), batch_size)


def load_clip_classes(path: str | os.PathLike[str] | None = None) -> tuple[list[str], list[str]]:
    """Reads descriptions to keep and to drop, `{"keep": [...], "drop": [...]}`; by default ours.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not of this form.
    """
    source = resources.files(_PACKAGE) / "clip_classes.json" if path is None else Path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        keep, drop = list(content["keep"]), list(content["drop"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: lists keep and drop of descriptions expected") from error
    if not keep or not drop or not all(isinstance(text, str) for text in (*keep, *drop)):
        raise ValueError(f"{source}: at least one description to keep and one to drop expected")
    return keep, drop


def _open_clip(name: str, weights: str | None, device: Any, batch_size: int) -> ClipScorer:
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=weights, device=device
    )
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    identity = name if weights is None else f"{name} {_identity(weights)}"
    return ClipScorer(
        identity,
        lambda images: model.encode_image(torch.stack([preprocess(i) for i in images]).to(device)),
        lambda texts: model.encode_text(tokenizer(list(texts)).to(device)),
        scale=float(model.logit_scale.detach().exp()),
        batch_size=batch_size,
    )


def _hf_clip(name: str, device: Any, batch_size: int) -> ClipScorer:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(name).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
    tokenizer = AutoTokenizer.from_pretrained(name)
    max_length = model.config.text_config.max_position_embeddings
    # SigLIP was trained with every text padded to its full length, and sees no padding mask.
    padding = "max_length" if "siglip" in model.config.model_type else True

    def encode_texts(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding=padding,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        used = [key for key in ("input_ids", "attention_mask") if key in tokens]
        return model.get_text_features(**{key: tokens[key].to(device) for key in used})

    scale = getattr(model, "logit_scale", None)
    return ClipScorer(
        _identity(name),
        lambda images: model.get_image_features(
            **processor(images=list(images), return_tensors="pt").to(device)
        ),
        encode_texts,
        scale=_SCALE if scale is None else float(scale.detach().exp()),
        batch_size=batch_size,
    )


def _unit(features: Tensor) -> Tensor:
    features = features.float().cpu()
    return features / features.norm(dim=-1, keepdim=True)


def _identity(name: str) -> str:
    """Name, with size and time where it is a file, so that other weights are other inputs."""
    from pathcore.files import file_identity

    path = Path(name)
    files = (
        [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    )
    return " ".join([name, *(f"{size}:{time}" for _, size, time in map(file_identity, files))])


def _device(name: str | None) -> Any:
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))

"""Image-text encoders by name: any of open_clip, any CLIP-like model of Hugging Face.

open_clip:ViT-L-14-336@weights.pt    a model of open_clip with weights from a file or by tag
open_clip:local-dir:FOLDER           a folder with open_clip's config and weights
hf:FOLDER_OR_NAME                    a model of transformers with image and text features
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pathcore.files import sha256_of

if TYPE_CHECKING:
    from PIL import Image

_TEXTS_AT_ONCE = 64
_GIVEN = ("input_ids", "attention_mask")  # SigLIP has no mask


class PairEncoder(Protocol):
    """Maps images and texts into one space.

    Attributes:
        name: Can be a folder's name; differs when the weights do.
    """

    name: str

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Features `(N, dim)` of length 1."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Features `(N, dim)` of length 1."""
        ...


def open_encoder(spec: str, *, device: str | None = None) -> PairEncoder:
    """Opens an encoder by its name; see the head of this module.

    Args:
        spec: `open_clip:...` or `hf:...`.
        device: By default a GPU where there is one.

    Raises:
        FileNotFoundError: A folder or file of weights that is not there.
        ValueError: An unknown library or model, or open_clip without weights.
    """
    library, _, name = spec.partition(":")
    if library not in ("open_clip", "hf") or not name:
        raise ValueError(f"encoder {spec!r}: open_clip:MODEL@WEIGHTS or hf:MODEL expected")
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _OpenCLIP(name, place) if library == "open_clip" else _HuggingFace(name, place)


class _OpenCLIP:
    def __init__(self, name: str, device: str) -> None:
        import open_clip

        model, _, weights = name.partition("@")
        local = model.startswith("local-dir:")
        folder = Path(model.removeprefix("local-dir:"))
        if local and not folder.is_dir():
            raise FileNotFoundError(f"encoder {folder}: no such folder")
        if not local and not weights:
            raise ValueError(f"encoder {model}: weights expected, open_clip:{model}@FILE_OR_TAG")
        if not local and model not in open_clip.list_models():
            raise ValueError(f"encoder {model}: open_clip has no such model")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not local and weights not in tags and not Path(weights).is_file():
            raise FileNotFoundError(f"weights {weights}: no such file, and no tag of {tags}")
        self._device = device
        found, self._preprocess = open_clip.create_model_from_pretrained(
            model, pretrained=weights or None, device=device
        )
        self._model = found.eval()
        self._tokenizer = open_clip.get_tokenizer(model)
        self.name = _name(folder.name if local else model, folder if local else Path(weights))

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        pixels = torch.stack([self._preprocess(image) for image in images]).to(self._device)
        with torch.inference_mode():
            return _unit(self._model.encode_image(pixels))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                tokens = self._tokenizer(list(texts[start : start + _TEXTS_AT_ONCE]))
                parts.append(_unit(self._model.encode_text(tokens.to(self._device))))
        return np.concatenate(parts)


class _HuggingFace:
    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoModel, AutoProcessor

        if name[:1] in ("/", ".", "~") and not Path(name).is_dir():
            raise FileNotFoundError(f"encoder {name}: no such folder")
        self._device = device
        self._model = AutoModel.from_pretrained(name).to(device).eval()
        if not hasattr(self._model, "get_image_features"):
            raise ValueError(f"encoder {name}: {type(self._model).__name__} has no image features")
        self._processor = AutoProcessor.from_pretrained(name)
        self.name = _name(Path(name).name, Path(name))

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return _unit(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        length = self._model.config.text_config.max_position_embeddings
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                tokens = self._processor(
                    text=list(texts[start : start + _TEXTS_AT_ONCE]),
                    padding="max_length",
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                )
                given = {k: tokens[k].to(self._device) for k in _GIVEN if k in tokens}
                parts.append(_unit(self._model.get_text_features(**given)))
        return np.concatenate(parts)


def _unit(features: Any) -> NDArray[np.float32]:
    features = features.float()
    normed: NDArray[np.float32] = (features / features.norm(dim=-1, keepdim=True)).cpu().numpy()
    return normed


def _name(name: str, weights: Path) -> str:
    """The model's name with a digest of its weights, or with their tag."""
    if weights.exists():
        tail = sha256_of(weights)[:12]
    else:
        tail = hashlib.sha256(str(weights).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}_{tail}"

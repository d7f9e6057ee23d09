"""A trained CLIP as two functions: images to features, texts to features, both of length 1."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TEXT_BATCH = 256


class ClipEncoder:
    """Image and text tower with the preprocessing that belongs to them.

    Args:
        name: As it appears in reports.
        identity: Tells it from any other: name, and sizes and times of its files.
        preprocess: PIL image -> `(3, height, width)`.
        encode_pixels: `(batch, 3, height, width)` -> `(batch, dim)`.
        encode_tokens: Texts -> `(batch, dim)`.
        device: Where it computes.
    """

    def __init__(
        self,
        name: str,
        identity: Sequence[Any],
        preprocess: Callable[[Any], Tensor],
        encode_pixels: Callable[[Tensor], Tensor],
        encode_tokens: Callable[[list[str]], Tensor],
        device: torch.device,
    ) -> None:
        self.name = name
        self.identity = json.loads(json.dumps(identity))
        self.preprocess = preprocess
        self.device = device
        self._encode_pixels = encode_pixels
        self._encode_tokens = encode_tokens

    @property
    def digest(self) -> str:
        """Of the identity, short."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features `(batch, dim)` in fp32 of `(batch, 3, height, width)`."""
        features = self._encode_pixels(pixel_values.to(self.device))
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features `(num_texts, dim)` in fp32."""
        parts = [
            self._encode_tokens(list(texts[start : start + _TEXT_BATCH]))
            for start in range(0, len(texts), _TEXT_BATCH)
        ]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu()


def load_clip(model: str, *, device: str | None = None) -> ClipEncoder:
    """Loads a CLIP.

    Args:
        model: A folder that `train-clip` wrote (`open_clip/` or `hf/`), any folder of open_clip or
            of transformers' CLIP, or `ARCHITECTURE:TAG` of open_clip, `ARCHITECTURE:CHECKPOINT`
            for a file.
        device: `cuda` or `cpu`; by default a GPU where there is one.

    Raises:
        FileNotFoundError: No such folder or checkpoint.
        ValueError: A folder of neither library, or weights of another architecture.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(model)
    if not folder.is_dir():
        return _open_clip(model, chosen)
    inner = folder / "open_clip"
    folder = inner if inner.is_dir() and not (folder / "config.json").is_file() else folder
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{folder}", chosen)
    if (folder / "config.json").is_file():
        return _hugging_face(folder, chosen)
    raise ValueError(f"model {model}: neither open_clip_config.json nor config.json in it")


def _open_clip(model: str, device: torch.device) -> ClipEncoder:
    import open_clip

    if model.startswith("local-dir:"):
        arch, pretrained, folder = model, None, Path(model.removeprefix("local-dir:"))
        identity: list[Any] = [_files_identity(folder)]
    else:
        arch, colon, pretrained = model.partition(":")
        identity = [model]
        if not colon or not pretrained:
            raise FileNotFoundError(
                f"model {model}: neither a folder nor ARCHITECTURE:TAG of open_clip; without "
                "weights there is nothing to evaluate"
            )
        if arch not in open_clip.list_models():
            raise ValueError(f"model {model}: open_clip has no architecture {arch}")
        if Path(pretrained).is_file():
            identity.append(_files_identity(Path(pretrained)))
        elif (arch, pretrained) not in open_clip.list_pretrained():
            known = open_clip.list_pretrained_tags_by_model(arch)
            raise FileNotFoundError(
                f"model {model}: {pretrained} is neither a file nor one of {', '.join(known)}"
            )
    try:
        built, _, preprocess = open_clip.create_model_and_transforms(
            arch, pretrained=pretrained, device=device
        )
    except RuntimeError as error:
        raise ValueError(f"model {model}: {str(error).splitlines()[0]}") from error
    tokenizer = open_clip.get_tokenizer(arch)
    built.eval()
    return ClipEncoder(
        model.removeprefix("local-dir:"),
        identity,
        preprocess,
        built.encode_image,
        lambda texts: built.encode_text(tokenizer(texts).to(device)),
        device,
    )


def _hugging_face(folder: Path, device: torch.device) -> ClipEncoder:
    from transformers import AutoModel, AutoProcessor

    built = AutoModel.from_pretrained(folder).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if not hasattr(built, "get_text_features"):
        raise ValueError(f"model {folder}: {type(built).__name__} has no text features")
    length = int(built.config.text_config.max_position_embeddings)

    def preprocess(image: Any) -> Tensor:
        return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def encode_tokens(texts: list[str]) -> Tensor:
        tokens = processor.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return built.get_text_features(**tokens.to(device))

    def encode_pixels(pixel_values: Tensor) -> Tensor:
        return built.get_image_features(pixel_values=pixel_values)

    identity = [_files_identity(folder)]
    return ClipEncoder(str(folder), identity, preprocess, encode_pixels, encode_tokens, device)


def _files_identity(path: Path) -> list[Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, os.stat(file)) for file in files if file.is_file()]
    return [str(path.absolute()), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]

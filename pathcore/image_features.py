"""Computes features of many images in parts, each of which is cached for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pathcore.encoders import Encoder
from pathcore.files import atomic_file, folder_lock
from pathcore.images import ImageError

PART_SIZE = 2048
"""Images whose features are stored together: what a kill can cost."""


class ImageSource(Protocol):
    """An image that can be opened; picklable, for loading in other processes."""

    @property
    def id(self) -> str:
        """Name of the image in reports."""

    def open(self) -> Any:
        """Returns the image in RGB; raises OSError or ValueError if it cannot be read."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the images that could be read.

    Attributes:
        features: float32 `(N, dim)`.
        kept: int64 `(N,)`, indices of the images that the features belong to.
        skipped: `id` and `reason` of each of the other images.
    """

    features: NDArray[np.float32]
    kept: NDArray[np.int64]
    skipped: tuple[dict[str, str], ...]


class _Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: Sequence[ImageSource], preprocess: Any) -> None:
        self._images, self._preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self._preprocess(self._images[index].open())
        except (OSError, ValueError, SyntaxError) as error:
            return index, ImageError(f"{type(error).__name__}: {error}")


def image_features(
    encoder: Encoder,
    images: Sequence[ImageSource],
    cache_dir: Path,
    *,
    joint: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> ImageFeatures:
    """Computes features, or loads those that an earlier run cached.

    Args:
        encoder: Encoder that computes the features.
        images: All images of the data set, in a fixed order.
        cache_dir: Cache; gets one folder per encoder and list of images.
        joint: Whether to compute L2-normalised features in the space of the texts, if the encoder
            has one (`Encoder.encode_images`), instead of `Encoder.features`.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images; 0 reads them in this process.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no image can be read, or another run is computing the same features.
    """
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.id.encode("utf-8", "surrogateescape") + b"\0")
    kind = "" if joint else "-features"
    folder = cache_dir / f"{encoder.folder_name}{kind}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        folder_lock(folder / ".lock"),
        tqdm(total=len(images), desc="Features", unit="image", disable=not progress) as bar,
    ):
        parts = []
        for start in range(0, len(images), PART_SIZE):
            file = folder / f"{start:09d}.npz"
            own = images[start : start + PART_SIZE]
            part = _read_part(file)
            if part is None:
                part = _compute(encoder, own, joint, batch_size, num_workers, bar)
                with atomic_file(file) as partial, partial.open("wb") as stream:
                    np.savez(stream, **part)
            else:
                bar.update(len(own))
            parts.append((start, part))
    kept = np.concatenate([start + part["kept"] for start, part in parts])
    skipped = tuple(row for _, part in parts for row in json.loads(str(part["skipped"])))
    if not len(kept):
        raise ValueError(f"none of {len(images)} images can be read; the first: {skipped[:1]}")
    return ImageFeatures(np.concatenate([p["features"] for _, p in parts if len(p["kept"])]), kept,
                         skipped)  # fmt: skip


def _compute(
    encoder: Encoder,
    images: Sequence[ImageSource],
    joint: bool,
    batch_size: int,
    num_workers: int,
    bar: Any,
) -> dict[str, Any]:
    encode = encoder.encode_images if joint else encoder.features
    loader = torch.utils.data.DataLoader(
        _Images(images, encoder.transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    features, kept, skipped = [], [], []
    for rows in loader:
        good = []
        for index, found in rows:
            if isinstance(found, ImageError):
                skipped.append({"id": images[index].id, "reason": str(found)})
            else:
                kept.append(index)
                good.append(found)
        if good:
            features.append(encode(torch.stack(good)).numpy())
        bar.update(len(rows))
    return {
        "features": np.concatenate(features) if features else np.zeros((0, 0), np.float32),
        "kept": np.array(kept, dtype=np.int64),
        "skipped": json.dumps(skipped),
    }


def _read_part(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with np.load(file) as part:
        return {name: part[name] for name in part.files}

"""Computes features of many images in parts, each of which is cached for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pathcore.encoders import Encoder
from pathcore.files import atomic_file, folder_lock
from pathcore.images import ImageError

PART_SIZE = 2048
"""Images whose features are stored together: what a kill can cost."""


_Part: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Features `(N, dim)`, and indices `(N,)` within the part of the images that they belong to."""


class ImageSource(Protocol):
    """An image that can be opened; picklable, for loading in other processes."""

    @property
    def id(self) -> str:
        """Name of the image in reports."""

    def identity(self) -> list[Any]:
        """Returns what differs for another or a changed image; raises OSError if it is missing."""

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

    Cached features belong to the description of the encoder, and to place, size and modification
    time of each image. Images that an earlier run could not read are tried again.

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
        ValueError: If no image can be read, features are not finite, or another run is computing
            the same features.
    """
    kind = "" if joint else "-features"
    described = json.dumps(encoder.describe(), sort_keys=True)
    digest = _digest([described, *(image.id for image in images)])
    folder = cache_dir / f"{encoder.folder_name}{kind}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    skipped: list[dict[str, str]] = []
    features, kept = [], []
    with (
        folder_lock(folder / ".lock"),
        tqdm(total=len(images), desc="Features", unit="image", disable=not progress) as bar,
    ):
        for start in range(0, len(images), PART_SIZE):
            own = images[start : start + PART_SIZE]
            # Images of one name may be others, as in folders of training and test images.
            file = folder / f"{start:09d}-{_digest(map(_identity, own))}.npz"
            part = _read_part(file)
            missing = np.setdiff1d(np.arange(len(own)), part[1] if part else ())
            bar.update(len(own) - len(missing))
            if len(missing):
                new, unread = _compute(encoder, own, missing, joint, batch_size, num_workers, bar)
                skipped += unread
                if new:
                    part = _joined(part, new) if part else new
                    with atomic_file(file) as partial, partial.open("wb") as stream:
                        np.savez(stream, features=part[0], kept=part[1])
            if part:
                features.append(part[0])
                kept.append(start + part[1])
    if not kept:
        raise ValueError(f"none of {len(images)} images can be read; the first: {skipped[:1]}")
    return ImageFeatures(np.concatenate(features), np.concatenate(kept), tuple(skipped))


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _identity(image: ImageSource) -> str:
    try:
        return repr(image.identity())
    except OSError:  # opening it says why
        return image.id


def _compute(
    encoder: Encoder,
    images: Sequence[ImageSource],
    indices: NDArray[np.int64],
    joint: bool,
    batch_size: int,
    num_workers: int,
    bar: Any,
) -> tuple[_Part | None, list[dict[str, str]]]:
    """Returns the features of some of the images, None if none can be read, and the others."""
    encode = encoder.encode_images if joint else encoder.features
    loader = torch.utils.data.DataLoader(
        _Images([images[index] for index in indices], encoder.transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    features, kept, skipped = [], [], []
    for rows in loader:
        good = []
        for position, found in rows:
            index = indices[position]
            if isinstance(found, ImageError):
                skipped.append({"id": images[index].id, "reason": str(found)})
            else:
                kept.append(index)
                good.append(found)
        if good:
            features.append(encode(torch.stack(good)).numpy())
            finite = np.isfinite(features[-1]).all(axis=1)
            if not finite.all():
                first = images[kept[len(kept) - len(good) + int(finite.argmin())]].id
                raise ValueError(
                    f"encoder {encoder.name}: features of {first} are not finite in "
                    f"{encoder.precision}; check the weights, and try bfloat16 or float32"
                )
        bar.update(len(rows))
    if not features:
        return None, skipped
    return (np.concatenate(features), np.array(kept, dtype=np.int64)), skipped


def _joined(known: _Part, new: _Part) -> _Part:
    order = np.argsort(np.concatenate([known[1], new[1]]))
    return np.concatenate([known[0], new[0]])[order], np.concatenate([known[1], new[1]])[order]


def _read_part(file: Path) -> _Part | None:
    if not file.is_file():
        return None
    with np.load(file) as part:
        return part["features"], part["kept"]

"""Image-caption pairs from a `pairs.jsonl`.

Each line is a JSON object with `id`, `image` (path relative to the image folder) and `caption`;
further fields are ignored. Unusable lines and images are recorded in a skip log and skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pallava.skipping import SkipLog
from pathcore.files import StrPath
from pathcore.images import ImageError, load_image, path_inside
from pathcore.rows import check_fraction, line_offsets, pair_fault, parse_line

_MAX_TRIES = 100  # pairs tried instead of one whose image is unreadable


class PairError(ValueError):
    """Raised for a line that is not a usable pair; the message gives the reason."""


class PairSample(TypedDict):
    """One item of `PairDataset`."""

    image: Tensor
    caption: str
    caption_id: int


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file.

    Attributes:
        id: Id of the pair.
        image: Path relative to the image folder.
        caption: Caption; not empty.
    """

    id: str
    image: str
    caption: str


def parse_pair(line: str | bytes) -> Pair:
    """Parses one line.

    Raises:
        PairError: If the line is not a JSON object, or a field is missing or empty.

    Example:
        >>> parse_pair('{"id": 1, "image": "a.png", "caption": "Liver."}').caption
        'Liver.'
    """
    row = parse_line(line)
    if fault := pair_fault(row):
        raise PairError(fault)
    return Pair(str(row["id"]), row["image"], row["caption"].strip())


def read_captions(pairs_file: StrPath) -> Iterator[str]:
    """Yields the captions of a pairs file; unusable lines are skipped.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    for _, line in line_offsets(pairs_file):
        try:
            yield parse_pair(line).caption
        except PairError:
            continue  # PairDataset reads the same file and records it


class PairDataset(Dataset[PairSample]):
    """Augmented image-caption pairs.

    Only the byte offset of each line is kept in memory. If an image cannot be read, it is recorded
    and the next pair is returned instead.

    Attributes:
        caption_ids: int64 `(N,)`, the `caption_id` of every pair.

    Args:
        pairs_file: Path of `pairs.jsonl`.
        image_folder: Folder that image paths are relative to. Defaults to the folder of the file.
        image_size: Side of the square output images in pixels.
        skip_log: Log of unusable lines and images.
        transform: Maps a Pillow image to a uint8 tensor `(3, image_size, image_size)`. Defaults to
            `histology_augmentation(image_size)`.

    Raises:
        FileNotFoundError: If the file or folder does not exist.
        ValueError: If the file has no usable lines, or more than a tenth are unusable.
    """

    def __init__(
        self,
        pairs_file: StrPath,
        image_folder: StrPath | None = None,
        *,
        image_size: int,
        skip_log: SkipLog,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.pairs_file = Path(pairs_file)
        self.image_folder = Path(image_folder) if image_folder else self.pairs_file.parent
        self.skip_log = skip_log
        self.transform = transform or histology_augmentation(image_size)
        if not self.image_folder.is_dir():
            raise FileNotFoundError(
                f"image_folder {self.image_folder}: no such folder; the paths in "
                f"{self.pairs_file} are taken relative to it"
            )
        self._index()

    def __len__(self) -> int:
        return len(self._offsets)

    def pair(self, index: int) -> Pair:
        """Returns the pair at an index, without its image."""
        with self.pairs_file.open("rb") as file:
            file.seek(self._offsets[index])
            return parse_pair(file.readline())

    def __getitem__(self, index: int) -> PairSample:
        """Loads a pair.

        Returns:
            `image` (uint8 `(3, image_size, image_size)`), `caption`, and `caption_id`, which is
            equal for captions that are equal up to case and whitespace, in every process and
            every file.

        Raises:
            ImageError: If many consecutive images cannot be read.
        """
        first_error = None
        tries = min(_MAX_TRIES, len(self))
        for position in range(index, index + tries):
            position %= len(self)
            pair = self.pair(position)
            path = path_inside(self.image_folder, pair.image)
            try:
                image = self.transform(load_image(path))
            except ImageError as error:
                self.skip_log.record(pair.id, path, error)
                first_error = first_error or error
                continue
            return PairSample(
                image=image, caption=pair.caption, caption_id=int(self.caption_ids[position])
            )
        raise ImageError(
            f"{tries} images in a row cannot be read, the first because: {first_error}. "
            f"Is image_folder {self.image_folder} the right one?"
        )

    def _index(self) -> None:
        offsets, digests, faults = [], [], {}
        for number, (offset, line) in enumerate(line_offsets(self.pairs_file), start=1):
            try:
                pair = parse_pair(line)
                path_inside(self.image_folder, pair.image)
            except (PairError, ImageError) as error:
                self.skip_log.record(f"line {number}", self.pairs_file, error)
                faults[f"line {number}"] = f"line {number}: {error}"
                continue
            offsets.append(offset)
            normalised = " ".join(pair.caption.lower().split()).encode()
            digests.append(hashlib.blake2b(normalised, digest_size=8).digest())
        check_fraction(len(faults), len(offsets) + len(faults), str(self.pairs_file), faults)
        if not offsets:
            raise ValueError(f"{self.pairs_file}: no pairs")
        self._offsets = np.asarray(offsets, dtype=np.int64)
        # Queues of a checkpoint hold ids, so that they must not depend on the rest of the data.
        keys = np.frombuffer(b"".join(digests), dtype="<u8")
        self.caption_ids = (keys >> np.uint64(1)).astype(np.int64)


def histology_augmentation(
    image_size: int, *, min_area: float = 0.5, jitter: float = 0.1, hue: float = 0.02
) -> nn.Module:
    """Returns a transform with random crop, flip, quarter turn and slight colour jitter.

    Tissue has no canonical orientation, so all eight are equally valid. Colours vary with stain and
    scanner, but strong jitter would contradict captions that mention the stain.

    Args:
        image_size: Side of the result in pixels.
        min_area: Minimum fraction of the image's area that a crop keeps.
        jitter: Range of brightness, contrast and saturation, as in torchvision's `ColorJitter`.
        hue: Range of hue.

    Returns:
        A module that maps a Pillow image to uint8 `(3, image_size, image_size)`.

    Example:
        >>> from PIL import Image
        >>> histology_augmentation(32)(Image.new("RGB", (80, 60))).shape
        torch.Size([3, 32, 32])
    """
    from torchvision.transforms import InterpolationMode, v2

    steps: list[nn.Module] = [
        v2.RandomResizedCrop(
            image_size, scale=(min_area, 1.0), interpolation=InterpolationMode.BICUBIC
        ),
        v2.PILToTensor(),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        RandomQuarterTurn(),
    ]
    if jitter or hue:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, hue))
    return v2.Compose(steps)


def plain_resize(image_size: int) -> nn.Module:
    """Resizes the whole image to a square, ignoring its aspect ratio, as PA-LLaVA's thumbnail.

    Args:
        image_size: Side of the result in pixels.

    Returns:
        A module that maps a Pillow image to uint8 `(3, image_size, image_size)`.
    """
    from torchvision.transforms import InterpolationMode, v2

    size = [image_size, image_size]
    return v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.PILToTensor()])


class RandomQuarterTurn(nn.Module):
    """Rotates an image `(3, S, S)` by 0, 90, 180 or 270 degrees, without interpolation."""

    def forward(self, image: Tensor) -> Tensor:
        """Returns the rotated image."""
        return torch.rot90(image, int(torch.randint(4, ())), (1, 2))


def collate_pairs(samples: list[PairSample]) -> dict[str, Any]:
    """Collates samples to `images` uint8 `(B, 3, S, S)`, `captions`, and `caption_ids` `(B,)`."""
    return {
        "images": torch.stack([sample["image"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "caption_ids": torch.tensor([sample["caption_id"] for sample in samples]),
    }

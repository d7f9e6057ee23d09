"""Preprocessing of exported classifiers, the same as in the test pipeline of their config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pathcore.rgb import to_rgb

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """Resizing and normalisation.

    Attributes:
        size: Width and height in pixels.
        mean: Mean of red, green and blue, on a scale from 0 to 255.
        std: Standard deviation of red, green and blue, on the same scale.
        interpolation: A key of `RESAMPLING`.
        keep_ratio: Whether to resize the shorter side and crop the centre, instead of changing the
            aspect ratio.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"
    keep_ratio: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"interpolation {self.interpolation!r}: expected one of {sorted(RESAMPLING)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: expected three numbers each")

    @property
    def output_px(self) -> int:
        """Side of the square images that come out."""
        return self.size

    def __call__(self, image: Image.Image | np.ndarray[Any, Any]) -> Tensor:
        """Maps an image, or RGB pixels `(height, width, 3)` uint8, to `(3, size, size)` fp32."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        pixels = torch.from_numpy(np.array(self._resize(to_rgb(image)))).permute(2, 0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Reads what `to_dict` returned."""
        return cls(**values | {key: tuple(values[key]) for key in ("mean", "std")})

    def _resize(self, image: Image.Image) -> Image.Image:
        resampling = RESAMPLING[self.interpolation]
        if not self.keep_ratio:
            return image.resize((self.size, self.size), resampling)
        from torchvision.transforms.functional import center_crop

        scale = self.size / min(image.size)
        sides = [max(self.size, round(side * scale)) for side in image.size]
        cut: Image.Image = center_crop(
            image.resize((sides[0], sides[1]), resampling), [self.size, self.size]
        )
        return cut

"""Transforms of a pipeline, from image files to the input of a model.

The test pipeline `LoadPatch`, `ResizePatch`, `PackPatch` is deterministic. It returns uint8 RGB
`(3, H, W)`, which the model's `data_preprocessor` normalises. With `IMAGENET_NORM`, the result
equals the published input up to rounding in float32.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from PIL import Image

from pathcore.encoders import find_transform
from pathcore.images import ImageError, load_image

IMAGENET_NORM = {
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "to_rgb": False,
}
"""Normalisation of the published code, for values from 0 to 255. `to_rgb` is False because pixels
are already RGB."""

CLIP_NORM = {
    "mean": [122.7709383, 116.7460125, 104.09373615],
    "std": [68.5005327, 66.6321579, 70.32316305],
    "to_rgb": False,
}
"""Normalisation of CLIP, 255 times the values in https://github.com/openai/CLIP."""

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, a multiplier that spreads seeds over 64 bits."""


@TRANSFORMS.register_module()
class LoadPatch:
    """Reads `img_path` into `img`, uint8 RGB `(H, W, 3)`.

    Raises:
        ValueError: If the image cannot be read. The message names its line in the annotation file.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds `img`, `img_shape` and `ori_shape`."""
        path = results["img_path"]
        try:
            pixels = np.asarray(load_image(path))
        except ImageError as error:
            line = f"{results.get('ann_file', '?')}:{results.get('ann_line', '?')}"
            raise ValueError(f"{line}: {path} cannot be read as an image: {error}") from error
        results["img"] = pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


@TRANSFORMS.register_module()
class ResizePatch:
    """Resizes with Pillow's antialiasing, which gives exactly the published pixels.

    Args:
        size: Width and height in pixels.
        interpolation: `bilinear` as published, `bicubic`, `nearest` or `lanczos`.
        keep_ratio: Whether to resize the shorter side and crop the centre, instead of changing the
            aspect ratio as published.

    Raises:
        ValueError: If the interpolation is unknown.
    """

    def __init__(
        self, size: int = 224, interpolation: str = "bilinear", keep_ratio: bool = False
    ) -> None:
        if interpolation not in _RESAMPLING:
            raise ValueError(
                f"ResizePatch: interpolation {interpolation!r}; expected one of "
                f"{', '.join(_RESAMPLING)}"
            )
        self.size = size
        self.resampling = _RESAMPLING[interpolation]
        self.keep_ratio = keep_ratio

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replaces `img` and `img_shape`."""
        image = Image.fromarray(results["img"])
        if self.keep_ratio:
            from torchvision.transforms.functional import center_crop

            scale = self.size / min(image.size)
            sides = [max(self.size, round(side * scale)) for side in image.size]
            image = center_crop(image.resize(sides, self.resampling), [self.size, self.size])
        else:
            image = image.resize((self.size, self.size), self.resampling)
        results["img"] = np.asarray(image)
        results["img_shape"] = results["img"].shape[:2]
        return results


@TRANSFORMS.register_module()
class EncoderResize:
    """Resizes and crops as an encoder expects; for use with `EncoderDataPreprocessor`.

    Args:
        encoder: Name of the encoder, see `pathcore.encoders`.

    Raises:
        EncoderError: If the encoder or its transform are unknown.
    """

    def __init__(self, encoder: str) -> None:
        self.transform = find_transform(encoder)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replaces `img` and `img_shape`."""
        results["img"] = np.asarray(self.transform.resize(Image.fromarray(results["img"])))
        results["img_shape"] = results["img"].shape[:2]
        return results


@MODELS.register_module()
class EncoderDataPreprocessor(BaseDataPreprocessor):
    """Stacks patches of `EncoderResize` and normalises them exactly as an encoder expects.

    Args:
        encoder: Name of the encoder, see `pathcore.encoders`.
        batch_augments: Name under which MMPreTrain passes its `train_cfg`; must be empty.
        **kwargs: Arguments of MMEngine's `BaseDataPreprocessor`.

    Raises:
        EncoderError: If the encoder or its transform are unknown.
        ValueError: If `batch_augments` is not empty.
    """

    def __init__(self, encoder: str, batch_augments: Any = None, **kwargs: Any) -> None:
        if batch_augments:
            raise ValueError(
                f"train_cfg {batch_augments}: images of EncoderDataPreprocessor are not mixed; use "
                "the host's data preprocessor with mean and std"
            )
        super().__init__(**kwargs)
        self.transform = find_transform(encoder)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepares a batch as the data loader collates it."""
        data = dict(self.cast_data(data))
        inputs = data["inputs"]
        pixels = torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
        return data | {"inputs": self.transform.normalise(pixels)}


@TRANSFORMS.register_module()
class AugmentPatch:
    """Random colour jitter, flips and rotations by multiples of 90 degrees.

    With a sampler of `cite.mm.samplers`, random numbers depend only on `seed` and the number of the
    draw, so that any number of workers, and a resumed run, produce the same pixels. Colour jitter
    is torchvision's, because the hue of mmcv's overflows with numpy 2.

    Args:
        brightness: Range of the factor, 1 - brightness to 1 + brightness, or a pair.
        contrast: Range of the factor, like `brightness`.
        saturation: Range of the factor, like `brightness`.
        hue: Range of the shift, -hue to hue, in turns of the colour circle; or a pair.
        flip: Probability of a horizontal flip and, independently, of a vertical flip.
        turn: Whether to rotate by a random multiple of 90 degrees.
        seed: Seed of the random numbers.
    """

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.2,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.2,
        hue: float | tuple[float, float] = 0.1,
        flip: float = 0.5,
        turn: bool = True,
        seed: int = 0,
    ) -> None:
        from torchvision.transforms import ColorJitter

        def pair(value: Any) -> Any:
            return value if isinstance(value, (int, float)) else tuple(value)

        self.jitter = ColorJitter(*map(pair, (brightness, contrast, saturation, hue)))
        self.flip = flip
        self.turn = turn
        self.seed = seed

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replaces `img` and `img_shape`."""
        generator = self._generator(results.get("draw"))
        # ColorJitter draws from torch's global generator, which must not be affected otherwise.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.getrandbits(63))
            pixels = np.asarray(self.jitter(Image.fromarray(results["img"])))
        if generator.random() < self.flip:
            pixels = pixels[:, ::-1]
        if generator.random() < self.flip:
            pixels = pixels[::-1]
        if self.turn:
            pixels = np.rot90(pixels, generator.randrange(4))
        results["img"] = np.ascontiguousarray(pixels)
        results["img_shape"] = pixels.shape[:2]
        return results

    def _generator(self, draw: int | None) -> random.Random:
        if draw is None:
            return random.Random(random.getrandbits(64))
        return random.Random((self.seed * _GOLDEN + draw) % 2**64)


@TRANSFORMS.register_module()
class PatchGastricPipeline:
    """The pipeline of the published code under its name: loads, resizes and augments.

    The published configs leave `test_mode` False in validation and test, which makes scores random,
    and draw the saturation from 0 to 0.2, which makes images nearly grey.

    Args:
        test_mode: Whether to omit the augmentation.
        size: Width and height in pixels.
        seed: Seed of the augmentation.
    """

    def __init__(self, test_mode: bool = False, size: int = 224, seed: int = 0) -> None:
        self.steps = [LoadPatch(), ResizePatch(size)]
        if not test_mode:
            self.steps.append(AugmentPatch(saturation=(0, 0.2), seed=seed))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds `img`, uint8 `(size, size, 3)`."""
        for step in self.steps:
            results = step(results)
        return results


@TRANSFORMS.register_module()
class PackPatch:
    """Packs `img` and `gt_label` for MMClassification or MMPreTrain.

    Args:
        meta_keys: Further keys to store in the sample.
        host: `mmcls` or `mmpretrain`; by default the default scope of the config.
    """

    META_KEYS = ("sample_idx", "img_path", "slide", "ori_shape", "img_shape")

    def __init__(
        self,
        meta_keys: tuple[str, ...] = META_KEYS,
        host: Literal["mmcls", "mmpretrain"] | None = None,
    ) -> None:
        self.meta_keys = tuple(meta_keys)
        # Resolved here, because worker processes of a data loader may not know the scope.
        self.host = host or default_host()

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Returns `inputs`, uint8 `(3, H, W)`, and `data_samples`."""
        if self.host == "mmcls":
            from mmcls.structures import ClsDataSample as Sample
        else:
            from mmpretrain.structures import DataSample as Sample
        sample = Sample()
        if "gt_label" in results:
            sample.set_gt_label(results["gt_label"])
        sample.set_metainfo({key: results[key] for key in self.meta_keys if key in results})
        pixels = np.ascontiguousarray(results["img"].transpose(2, 0, 1))
        return {"inputs": torch.from_numpy(pixels), "data_samples": sample}


def default_host() -> str:
    """Returns the default scope of the running config, `mmcls` or `mmpretrain`.

    Raises:
        ValueError: If it is another scope.
    """
    scope = DefaultScope.get_current_instance()
    name = scope.scope_name if scope else "mmcls"
    if name not in ("mmcls", "mmpretrain"):
        raise ValueError(f"default_scope is {name!r}; expected 'mmcls' or 'mmpretrain'")
    return str(name)

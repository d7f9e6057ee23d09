"""Tiles to embeddings: device, precision, batches."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigapath import tile_encoder
from gigapath.tile_encoder import CROP_PX
from pathcore.encoders.transform import Transform
from pathcore.files import sha256_of
from wsi.features import Resize

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIGEST_CHARS = 8


def choose_device(device: str | None = None) -> torch.device:
    """Returns the device named, else the first GPU, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_precision(precision: Precision, device: torch.device) -> str:
    """Resolves `auto`: fp16 on a GPU, as the original computes, else fp32.

    Raises:
        ValueError: No such precision.
    """
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if precision not in _DTYPES:
        raise ValueError(f"precision {precision!r}: auto, {', '.join(_DTYPES)} expected")
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a precision; none for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


@dataclass(frozen=True)
class TileEncoderSpec:
    """Which tile encoder to open, and how; a plain value that other processes understand.

    Attributes:
        pretrained: See `tile_encoder.create_model`.
        model_arch: See there.
        precision: fp32, bf16 or fp16.
        name: Name of the folder of its features.
        digest: SHA-256 of the weights; empty for random ones.
        seed: Seed of random weights.
        transform: How tiles become the images that the encoder expects; by default the published
            transform of Prov-GigaPath.
    """

    pretrained: str
    model_arch: str | None
    precision: str
    name: str
    digest: str = ""
    seed: int = 0
    transform: Transform | None = None


def describe_encoder(
    pretrained: str, *, model_arch: str | None = None, precision: str = "fp32", seed: int = 0
) -> TileEncoderSpec:
    """Finds the weights of a tile encoder and its transform, and gives them a unique name.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the transform of the encoder is not known.
    """
    transform = tile_encoder.encoder_transform(pretrained, model_arch)
    if transform.output_px is None:
        raise ValueError(f"tile encoder {pretrained}: its transform gives no square images")
    if pretrained in ("", tile_encoder.RANDOM):
        name = f"random-{model_arch or tile_encoder.DEFAULT_ARCHITECTURE}-{seed}"
        return TileEncoderSpec("", model_arch, precision, name, seed=seed, transform=transform)
    weights = tile_encoder.find_tile_weights(pretrained)
    digest = sha256_of(weights.path)
    published = {
        tile_encoder.HUB_NAME: "prov-gigapath",
        tile_encoder.FLASH_HUB_NAME: "prov-gigapath-flash",
    }
    known = published.get(pretrained.replace("hf-hub:", "hf_hub:"))
    stem = weights.path.stem if Path(pretrained).is_file() else Path(pretrained).name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60] or "encoder"
    # The published names stay as the field knows them; the digest stands in the file.
    name = known or f"{stem}-{digest[:_DIGEST_CHARS]}"
    return TileEncoderSpec(pretrained, model_arch, precision, name, digest, seed, transform)


def embedding_width(spec: TileEncoderSpec) -> int:
    """Width of an encoder's embeddings, without loading its weights into a model."""
    return tile_encoder.embedding_width(spec.pretrained, spec.model_arch)


class TileEncoder:
    """A tile encoder on a device.

    Args:
        model: The model; it is moved, and in low precision its matrices are converted in place.
        device: Where to compute.
        precision: fp32, bf16 or fp16; the latter two under autocast.
        transform: How tiles become the images that the model expects; by default the published
            transform of Prov-GigaPath, for images of the model's size.

    Raises:
        ValueError: If the transform gives images of another size than the model takes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        transform: Transform | None = None,
    ) -> None:
        self.device, self.precision = torch.device(device), precision
        self.model = model.to(self.device).eval()
        if precision != "fp32":
            _convert_matrices(self.model, _DTYPES[precision])
        self.embed_dim = int(cast(Any, model).num_features)
        image_px = _image_px(model)
        self.transform = transform or tile_encoder.published_transform(image_px or CROP_PX)
        if image_px not in (None, self.transform.output_px) and not _takes_any_size(model):
            raise ValueError(
                f"tile encoder: takes images of {image_px} px, its transform gives "
                f"{self.transform.output_px} px; correct input_size or img_size in config.json"
            )
        self.crop_px = self.transform.output_px or CROP_PX
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self._mean = torch.tensor(self.transform.mean, **options).view(1, 3, 1, 1)
        self._std = torch.tensor(self.transform.std, **options).view(1, 3, 1, 1)

    @property
    def resize(self) -> Resize:
        """How tiles are resized and cropped before `encode`."""
        transform = self.transform
        return Resize(self.crop_px, transform.resize_px, transform.interpolation)

    def describe(self) -> dict[str, Any]:
        """Returns what a features file should say about the encoder."""
        return {"precision": self.precision, "transform": json.dumps(self.transform.to_dict())}

    @classmethod
    def open(cls, spec: TileEncoderSpec, *, device: torch.device | str = "cpu") -> TileEncoder:
        """Builds the encoder that a description names."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = tile_encoder.create_model(spec.pretrained, spec.model_arch)
        return cls(model, device=device, precision=spec.precision, transform=spec.transform)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Embeds tiles that are resized and cropped already.

        Args:
            pixels: RGB `(batch, crop_px, crop_px, 3)`.

        Returns:
            float32 `(batch, embed_dim)` on the device.
        """
        images = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        # As torchvision's ToTensor and Normalize compute, to the bit.
        values = images.permute(0, 3, 1, 2).contiguous().float().div_(255)
        values.sub_(self._mean).div_(self._std)
        return self.encode_normalised(values)

    @torch.inference_mode()
    def encode_normalised(self, values: Tensor) -> Tensor:
        """Embeds `(batch, 3, height, width)` as `tile_transform` gives it."""
        with autocast(self.precision, self.device):
            embeddings: Tensor = self.model(values.to(self.device))
        return embeddings.float()


def _convert_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts what autocast would convert anew in every batch; the results are the same.

    Norms, layer scales and the sum of the residual stream stay in fp32.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def _image_px(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def _takes_any_size(model: nn.Module) -> bool:
    return not getattr(getattr(model, "patch_embed", None), "strict_img_size", True)

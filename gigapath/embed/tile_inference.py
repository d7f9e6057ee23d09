"""Runs tile encoders: choice of device and precision, normalisation, forward pass."""

from __future__ import annotations

import json
import os
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
from pathcore.device_claims import choose_device
from pathcore.encoders import Encoder, create_encoder, list_encoders
from pathcore.encoders.transform import Transform
from pathcore.files import read_json, sha256_of
from wsi.features import Resize

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIGEST_CHARS = 8
_LIBRARIES = ("timm", "hf", "open_clip")


def choose_precision(precision: Precision, device: torch.device) -> str:
    """Resolves `auto` to fp16 on a GPU, as in the original, and to fp32 elsewhere.

    Raises:
        ValueError: If the precision is unknown.
    """
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if precision not in _DTYPES:
        raise ValueError(f"precision {precision!r}: expected auto, {', '.join(_DTYPES)}")
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Returns an autocast context, or one that does nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


@dataclass(frozen=True)
class TileEncoderSpec:
    """Tile encoder and precision, as a plain value that can be sent to other processes.

    Attributes:
        pretrained: Weights, as for `tile_encoder.create_model`.
        model_arch: Architecture, as for `tile_encoder.create_model`.
        precision: `fp32`, `bf16` or `fp16`.
        name: Name of the folder of its features.
        digest: SHA-256 of the weights; empty for random weights.
        seed: Seed of random weights.
        transform: Preprocessing of the encoder; by default the published transform of
            Prov-GigaPath.
        named: Whether `pretrained` is a name that `pathcore.encoders.create_encoder` takes.
        embed_dim: Length of the features of a named encoder.
        patch_px: Side in pixels of the patches that a named encoder was published with.
        mpp: Micrometres per pixel of those patches.
    """

    pretrained: str
    model_arch: str | None
    precision: str
    name: str
    digest: str = ""
    seed: int = 0
    transform: Transform | None = None
    named: bool = False
    embed_dim: int = 0
    patch_px: int = 256
    mpp: float = 0.5


def describe_encoder(
    pretrained: str, *, model_arch: str | None = None, precision: str = "fp32", seed: int = 0
) -> TileEncoderSpec:
    """Finds the weights of a tile encoder and its transform, and gives them a unique name.

    Args:
        pretrained: Weights as for `tile_encoder.create_model`, or a name for
            `pathcore.encoders.create_encoder`: a preset, `timm:`, `hf:`, `open_clip:`, or a folder
            that transformers or open_clip wrote.
        model_arch: Architecture, as for `tile_encoder.create_model`.
        precision: fp32, bf16 or fp16.
        seed: Seed of random weights.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the transform of the encoder is not known, or the name is unknown.
    """
    if model_arch is None and _is_named(pretrained):
        return _describe_named(pretrained, precision)
    transform = tile_encoder.encoder_transform(pretrained, model_arch)
    if transform.output_px is None:
        raise ValueError(f"tile encoder {pretrained}: its transform does not produce square images")
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
    # Released encoders keep the names that other tools use; files record their digest anyway.
    name = known or f"{stem}-{digest[:_DIGEST_CHARS]}"
    return TileEncoderSpec(pretrained, model_arch, precision, name, digest, seed, transform)


def embedding_width(spec: TileEncoderSpec) -> int:
    """Returns the width of an encoder's embeddings without loading its weights into a model."""
    if spec.named:
        return spec.embed_dim
    return tile_encoder.embedding_width(spec.pretrained, spec.model_arch)


def _is_named(pretrained: str) -> bool:
    """Returns whether a string names an encoder of `pathcore.encoders` rather than weights."""
    if pretrained in ("", tile_encoder.RANDOM) or pretrained.startswith(("hf_hub:", "hf-hub:")):
        return False
    path = Path(pretrained)
    if path.is_dir():
        config = path / "config.json"
        if config.is_file():  # transformers writes a model_type, timm an architecture
            content = read_json(config, what="tile encoder config")
            return "architecture" not in content and "model_type" in content
        return any((path / f / "open_clip_config.json").is_file() for f in (".", "open_clip"))
    if path.is_file():
        return False
    head = re.split(r"[:@]", pretrained)[0]
    return head in (*_LIBRARIES, *list_encoders()) or os.sep not in pretrained


def _describe_named(name: str, precision: str) -> TileEncoderSpec:
    """Describes an encoder of `pathcore.encoders`; builds it, because the digest needs weights."""
    encoder = create_encoder(name, device="cpu")
    scales = encoder.mpp or (0.5,)
    return TileEncoderSpec(
        name,
        None,
        precision,
        encoder.folder_name,
        encoder.digest,
        transform=encoder.transform,
        named=True,
        embed_dim=encoder.embed_dim,
        patch_px=encoder.patch_px or 256,
        # Encoders trained at several resolutions get 0.5 um/px, the default of all commands here.
        mpp=0.5 if 0.5 in scales else scales[0],
    )


def open_tile_encoder(
    spec: TileEncoderSpec, device: torch.device | str = "cpu"
) -> TileEncoder | NamedEncoder:
    """Builds the tile encoder of a spec.

    Raises:
        ValueError: If the weights of a named encoder changed since the spec was made.
    """
    if not spec.named:
        return TileEncoder.open(spec, device=device)
    precision = str(_DTYPES[spec.precision]).removeprefix("torch.")
    encoder = create_encoder(spec.pretrained, device=device, precision=precision)
    if encoder.digest != spec.digest:
        raise ValueError(f"tile encoder {spec.pretrained}: its weights have changed meanwhile")
    return NamedEncoder(encoder)


class NamedEncoder:
    """Adapts an encoder of `pathcore.encoders` to the `PatchEncoder` interface of `wsi.features`.

    Args:
        encoder: The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._normalise = _Normalise(encoder.transform, encoder.device)

    @property
    def resize(self) -> Resize | None:
        """How tiles are resized and cropped before `encode`; None if they are not."""
        transform = self.encoder.transform
        if transform.output_px is None:
            return None
        return Resize(transform.output_px, transform.resize_px, transform.interpolation)

    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Maps uint8 RGB `(batch, height, width, 3)` to float32 `(batch, embed_dim)` on the CPU."""
        return self.encoder.features(self._normalise(pixels))

    def describe(self) -> dict[str, Any]:
        """Returns what a features file should say about the encoder.

        `patch_px` and `mpp` are those of the tiles in such a file, so what the encoder was made for
        is called `encoder_patch_px` and `encoder_mpp`.
        """
        described = self.encoder.describe()
        described["encoder_name"] = described.pop("encoder")
        for name in ("digest", "patch_px", "mpp"):
            described[f"encoder_{name}"] = described.pop(name)
        nested = {k: json.dumps(v) for k, v in described.items() if isinstance(v, (dict, list))}
        return {k: v for k, v in described.items() if v is not None} | nested


class _Normalise:
    """Converts pixels to `pixel_values` with the same bits as torchvision's ToTensor and Normalize.

    The bits are the same because the operations are: division by 255, subtraction, division.
    """

    def __init__(self, transform: Transform, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.device = device
        self.mean = torch.tensor(transform.mean, **options).view(1, 3, 1, 1)
        self.std = torch.tensor(transform.std, **options).view(1, 3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(pixels)
        # A copy from pinned memory is asynchronous, and uint8 is a quarter of the bytes of float32.
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        values = images.permute(0, 3, 1, 2).contiguous().float().div_(255)
        return values.sub_(self.mean).div_(self.std)


class TileEncoder:
    """Tile encoder on a device, with its precision and transform.

    Args:
        model: The network. It is moved to the device; for bf16 and fp16 its matrices are converted
            in place.
        device: Device to run on.
        precision: `fp32`, or `bf16` or `fp16` for autocast.
        transform: Preprocessing; by default the published transform of Prov-GigaPath at the image
            size of the model.

    Raises:
        ValueError: If the transform produces images of a size that the model does not accept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        transform: Transform | None = None,
    ) -> None:
        self.device, self.precision = choose_device(device), precision
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
        self._normalise = _Normalise(self.transform, self.device)

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
        """Builds the encoder of a spec; random weights depend only on its seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = tile_encoder.create_model(spec.pretrained, spec.model_arch)
        return cls(model, device=device, precision=spec.precision, transform=spec.transform)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Embeds tiles that are already resized and cropped.

        Args:
            pixels: uint8 RGB `(batch, crop_px, crop_px, 3)`.

        Returns:
            float32 `(batch, embed_dim)` on the device.
        """
        return self.encode_normalised(self._normalise(pixels))

    @torch.inference_mode()
    def encode_normalised(self, values: Tensor) -> Tensor:
        """Embeds normalised images `(batch, 3, height, width)`, as from `tile_transform`."""
        with autocast(self.precision, self.device):
            embeddings: Tensor = self.model(values.to(self.device))
        return embeddings.float()


def _convert_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts weights that autocast would otherwise convert in every batch; results are equal.

    Norms, layer scales and the residual stream stay in fp32.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def _image_px(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def _takes_any_size(model: nn.Module) -> bool:
    return not getattr(getattr(model, "patch_embed", None), "strict_img_size", True)

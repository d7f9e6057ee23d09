"""Features of a frozen vision encoder, stored on disk so that each image is encoded once.

A folder holds the features of one encoder for one tiling of the images. `<digest>.safetensors`,
named by the digest of the image file, holds `tiles` `(1 + num_sub_images, T, D)`. Three small files
record the encoder's digest and layer, the tiling and the precision; other settings need another
folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from pallava.anyres import AnyRes
from pathcore.files import StrPath, atomic_file, file_identity, read_json, sha256_of, write_json

_TILES = "tiles"
_GIB = 2**30


class CachedImage(NamedTuple):
    """An image whose features are stored, or will be.

    It is a named tuple because data loaders, MMEngine and DDP know how to move those to a device.

    Attributes:
        tiles: Features `(1 + num_sub_images, T, D)` if they are stored, or normalised pixels
            `(1 + num_sub_images, 3, S, S)`.
        file: File of the features.
    """

    tiles: Tensor
    file: str

    @property
    def is_stored(self) -> bool:
        """Whether `tiles` are features."""
        return self.tiles.dim() == 3


class FeatureCache:
    """Folder of features, as a dataset uses it.

    Args:
        folder: The folder; created if needed.
        anyres: Tiling of the images.

    Raises:
        ValueError: If the folder holds features of another tiling.
    """

    def __init__(self, folder: StrPath, anyres: AnyRes) -> None:
        self.folder = Path(folder)
        _claim(self.folder, "images", asdict(anyres))
        self._digests: dict[str, tuple[list[Any], str]] = {}

    def file_of(self, image: Path) -> Path:
        """Returns the file of an image's features, which need not exist.

        Raises:
            OSError: If the image cannot be read.
        """
        identity = file_identity(image)
        known = self._digests.get(str(image))
        if known is None or known[0] != identity:
            known = self._digests[str(image)] = identity, sha256_of(image)
        digest = known[1]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    @staticmethod
    def read(file: Path) -> CachedImage | None:
        """Returns the features in a file that `file_of` named, or None if they are not stored.

        Raises:
            OSError: If the file cannot be read.
        """
        with suppress(FileNotFoundError, SafetensorError, KeyError):
            # Not `load_file`, which maps the file: a disk that fails would kill the process.
            return CachedImage(load(file.read_bytes())[_TILES], str(file))
        return None


def check_encoder(model: Any, folder: StrPath) -> None:
    """Checks that the stored features of a folder are those of a model's encoder.

    Args:
        model: `LLaVAModel`.
        folder: Folder of features.

    Raises:
        ValueError: If the encoder is trained, random or divided by ZeRO-3, or the features are
            another encoder's.
    """
    encoder = model.visual_encoder
    if not hasattr(encoder, "features"):
        raise ValueError(f"feature_cache: {type(encoder).__name__} does not encode images")
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            "feature_cache stores the features of a frozen encoder, and this one is trained; set "
            "model.freeze_visual_encoder=True, or remove feature_cache"
        )
    if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
        raise ValueError(
            "feature_cache: ZeRO-3 divides the encoder among the processes, which would have to "
            "encode the same number of new images; use --deepspeed deepspeed_zero2, or remove "
            "feature_cache"
        )
    dropout = getattr(encoder.config, "attention_dropout", 0.0)
    dropout = max((m.p for m in encoder.modules() if isinstance(m, nn.Dropout)), default=dropout)
    if dropout:
        raise ValueError(
            f"feature_cache: the encoder drops out {dropout:.0%} of its activations, so that its "
            "features differ from epoch to epoch; remove feature_cache"
        )
    found = {
        "weights": _digest(encoder),
        "layer": model.visual_select_layer,
        "thumbnail_only": not model.projector.uses_sub_images,
    }
    _claim(Path(folder), "encoder", found)


def describe(model: Any, dataset: Any) -> str:
    """Logs how much disk space a dataset's features will need, before any are written.

    Args:
        model: `LLaVAModel`.
        dataset: `pallava.dataset.LLaVADataset` with a `feature_cache`.

    Raises:
        ValueError: If the features do not fit on the disk, or `check_encoder` raises.
    """
    folder = dataset.feature_cache.folder
    check_encoder(model, folder)
    if not dataset.knows_sub_images:
        return f"in {folder}; their size is unknown with check_images='none'"
    tiles = [number for _, number in dataset.cached_images()]
    if not model.projector.uses_sub_images:
        tiles = [1] * len(tiles)
    encoder = model.visual_encoder
    itemsize = next(encoder.parameters()).element_size()
    needed = sum(tiles) * encoder.num_patches * encoder.config.hidden_size * itemsize
    stored = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    free = shutil.disk_usage(folder).free
    if needed - stored > free:
        raise ValueError(
            f"feature_cache {folder}: {len(tiles):,} images need {needed / _GIB:,.1f} GiB, "
            f"{stored / _GIB:,.1f} GiB are there and {free / _GIB:,.1f} GiB are free; name a "
            "folder on a larger disk, or remove feature_cache"
        )
    return (
        f"{len(tiles):,} images, {sum(tiles):,} tiles, {needed / _GIB:,.2f} GiB in {folder}, of "
        f"which {stored / _GIB:,.2f} GiB are stored"
    )


def visual_tokens(model: Any, images: Sequence[CachedImage]) -> tuple[Tensor, Tensor, list[int]]:
    """Returns thumbnail tokens, tokens of all sub-images, and sub-image counts per image.

    Images without stored features are encoded together, and their features are stored.
    """
    parameter = next(model.visual_encoder.parameters())
    device = parameter.device
    whole = model.projector.uses_sub_images
    _check_precision(Path(images[0].file).parents[1], parameter)
    new = [image for image in images if not image.is_stored]
    encoded: list[Tensor] = []
    if new:
        stacks = [image.tiles if whole else image.tiles[:1] for image in new]
        tiles = [stack[:1] for stack in stacks] + [stack[1:] for stack in stacks]
        pixels = torch.cat(tiles).to(device, parameter.dtype)
        features = model.visual_encoder.features(pixels, model.visual_select_layer)
        thumbnails, rest = features[: len(new)], features[len(new) :]
        pieces = rest.split([len(stack) - 1 for stack in stacks])
        encoded = [torch.cat(pair) for pair in zip(thumbnails.split(1), pieces, strict=True)]
        for image, stored in zip(new, encoded, strict=True):
            with atomic_file(image.file) as partial:
                save_file({_TILES: stored.detach().cpu().contiguous()}, partial)
    fresh = iter(encoded)
    found = [image.tiles.to(device) if image.is_stored else next(fresh) for image in images]
    counts = [len(tiles) - 1 for tiles in found]
    return (
        torch.cat([tiles[:1] for tiles in found]),
        torch.cat([tiles[1:] for tiles in found]),
        counts,
    )


def _check_precision(folder: Path, parameter: Tensor) -> None:
    kind = parameter.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else parameter.dtype
    _claim(folder, "precision", {"dtype": str(dtype).removeprefix("torch."), "mixed": mixed})


def _claim(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Records a setting of the folder, or checks that the recorded one is the same."""
    found = json.loads(json.dumps(found))
    file = folder / f"{name}.json"
    if not file.is_file():
        write_json(file, found)
        return
    recorded = read_json(file, what="feature cache")
    different = sorted(k for k in {*found, *recorded} if found.get(k) != recorded.get(k))
    if different:
        key = different[0]
        raise ValueError(
            f"feature cache {folder}: its features were made with {key}={recorded.get(key)!r}, "
            f"this run has {key}={found.get(key)!r} ({file.name}); name another folder, or delete "
            "this one"
        )


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

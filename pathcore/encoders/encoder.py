"""Builds encoders by name and computes their features.

All commands accept these names:

- ``uni2-h``: a preset, with weights from the Hugging Face hub
- ``uni2-h@/path/to/weights``: a preset with weights from a file or folder
- ``timm:vit_base_patch16_224.augreg_in21k``: a model of timm, optionally with weights ``@FILE``
- ``hf:owner/name`` or ``hf:/path/to/folder``: a model of transformers
- ``open_clip:ViT-B-16@laion2b_s34b_b88k``: a model of open_clip with a tag or a file of weights
- ``/path/to/folder``: a folder written by one of these libraries
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pathcore.device_claims import choose_device
from pathcore.encoders.presets import Preset, get_preset
from pathcore.encoders.towers import (
    OPENAI_ENTRIES,
    POOLED_TYPES,
    VISION_TYPES,
    EncoderError,
    Tower,
    check_quick_gelu,
    default_feature,
    drop_unread,
    open_clip_config,
    open_clip_tower,
    open_tower,
    transformers_tower,
    vision_config,
)
from pathcore.encoders.transform import Transform, TransformError
from pathcore.files import read_json, sha256_of
from pathcore.names import did_you_mean
from pathcore.weights import CheckpointError, check_loading_report, load_strict, read_state_dict

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_LIBRARIES = ("timm", "hf", "open_clip")
_TEXTS_AT_ONCE = 64
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class EncoderName:
    """A parsed encoder name.

    Attributes:
        library: `preset`, `timm`, `hf`, `open_clip` or `folder`.
        model: Name of the preset or model, or path of the folder.
        weights: File, folder or tag after the `@`; empty if there is none.
    """

    library: str
    model: str
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> EncoderName:
        """Parses a name; the module docstring describes the grammar.

        Raises:
            EncoderError: If the name is empty, or names an unknown library or a missing folder.
            UnknownEncoderError: If it is neither a preset nor a folder. The message suggests
                similar presets.

        Example:
            >>> EncoderName.parse("uni2-h@weights/uni2.bin")
            EncoderName(library='preset', model='uni2-h', weights='weights/uni2.bin')
            >>> EncoderName.parse("open_clip:ViT-B-16@openai").library
            'open_clip'
        """
        if not text:
            raise EncoderError("encoder: the name is empty")
        library, colon, rest = text.partition(":")
        if colon and library in _LIBRARIES:
            # The name of a folder may contain an @, that of a model cannot.
            folder = library == "hf" and Path(rest).expanduser().exists()
            model, _, weights = (rest, "", "") if folder else rest.partition("@")
            if not model:
                raise EncoderError(f"encoder {text!r}: no model behind {library}:")
            return cls(library, model, weights)
        if Path(text).expanduser().is_dir():
            return cls("folder", str(Path(text).expanduser()))
        if text[:1] in ("/", ".", "~"):
            raise EncoderError(
                f"encoder {text!r}: no such folder; expected a preset, timm:NAME, hf:NAME, "
                "open_clip:ARCH@WEIGHTS or a folder"
            )
        if colon and "/" not in library and "@" not in library:
            raise EncoderError(
                f"encoder {text!r}: library {library!r}, expected one of {', '.join(_LIBRARIES)}; "
                "a model of open_clip is open_clip:ARCH@WEIGHTS"
            )
        model, _, weights = text.partition("@")
        get_preset(model)
        return cls("preset", model, weights)


@dataclass(frozen=True)
class Network:
    """A network with the functions that compute its features.

    Attributes:
        module: The network, on the CPU and in evaluation mode.
        features: Maps `pixel_values` `(batch, 3, height, width)` to features `(batch, embed_dim)`.
        transform: Maps images to `pixel_values`.
        embed_dim: Length of the features.
        files: Files of weights; empty if a library downloaded them itself.
        joint: Maps `pixel_values` to `(batch, dim)` in the space shared with texts; None if it is
            `features` or there is no text tower.
        texts: Maps texts and a device to `(num_texts, dim)` in that space.
        tower: Image tower, which shares weights with `module`; None if `module` is nothing else.
        num_cut: Counts the texts that exceed the context of the text tower, of which `texts` only
            reads the beginning; None if it is not known.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    transform: Transform
    embed_dim: int
    files: tuple[Path, ...] = ()
    joint: Callable[[Tensor], Tensor] | None = None
    texts: Callable[[list[str], torch.device], Tensor] | None = None
    tower: Tower | None = None
    num_cut: Callable[[list[str]], int] | None = None


class Encoder:
    """A frozen encoder with its transform; built by `create_encoder`.

    Attributes:
        name: Name of the encoder, without the path of the weights.
        transform: Maps RGB images to `pixel_values`.
        embed_dim: Length of the features.
        feature: How the network's output becomes a vector, see `Preset.feature`.
        patch_px: Side in pixels of the patches that the authors read from slides; None if unknown.
        mpp: Micrometres per pixel of those patches; empty if unknown.
        precision: Type in which features are computed: `float32`, `float16` or `bfloat16`.
        device: Device on which features are computed.
    """

    def __init__(
        self,
        name: str,
        built: Network,
        *,
        feature: str,
        patch_px: int | None,
        mpp: tuple[float, ...],
        precision: str,
        device: torch.device,
    ) -> None:
        self.name = name
        self.transform = built.transform
        self.embed_dim = built.embed_dim
        self.feature = feature
        self.patch_px = patch_px
        self.mpp = mpp
        self.precision = precision
        self.device = device
        self.module = built.module.to(device).eval().requires_grad_(False)
        self._built = built

    @property
    def input_px(self) -> int | None:
        """Side of the network's input images in pixels; None if it depends on the image."""
        return self.transform.output_px

    @property
    def has_text(self) -> bool:
        """Whether the encoder supports `encode_texts`."""
        return self._built.texts is not None

    @property
    def features_are_joint(self) -> bool:
        """Whether `encode_images` returns `features`, normalised, and not another output."""
        return self._built.joint is None or self.feature == "projected"

    @property
    def folder_name(self) -> str:
        """Folder name made of name and digest, so that different weights use different folders."""
        last = re.split(r"[:/]", self.name)[-1]
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', last)}_{self.digest[:12]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights file, or of the tensors if a library downloaded them itself."""
        if len(self._built.files) == 1:
            return sha256_of(self._built.files[0])
        digest = hashlib.sha256()
        for file in self._built.files:
            digest.update(sha256_of(file).encode())
        for name, tensor in () if self._built.files else self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns a description of the encoder for feature files, as JSON values."""
        return {
            "encoder": self.name,
            "digest": self.digest,
            "feature": self.feature,
            "embed_dim": self.embed_dim,
            "transform": self.transform.to_dict(),
            "patch_px": self.patch_px,
            "mpp": list(self.mpp),
            "precision": self.precision,
        }

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """Returns `pixel_values` `(num_images, 3, height, width)`, float32 on the CPU."""
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def features(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Computes features as defined by the authors of the encoder.

        Args:
            images: RGB images, or `pixel_values` `(batch, 3, height, width)`.

        Returns:
            float32 `(batch, embed_dim)` on the CPU, only normalised if the model does so.
        """
        return self._compute(self._built.features, images)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Computes normalised image embeddings, for comparison with texts or other images.

        Args:
            images: RGB images, or `pixel_values` `(batch, 3, height, width)`.

        Returns:
            float32 `(batch, dim)` of unit length on the CPU, in the space of the texts if the
            encoder has a text tower.
        """
        read = self._built.joint or self._built.features
        return nn.functional.normalize(self._compute(read, images), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Computes normalised text embeddings, for comparison with images.

        Returns:
            float32 `(num_texts, dim)` of unit length on the CPU.

        Raises:
            EncoderError: If the encoder has no text tower.
        """
        return self.text_features(texts).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Computes the embeddings of `encode_texts` on the device, for learned prompts.

        Weights are frozen, but gradients flow to whatever a hook puts into the text tower.

        Raises:
            EncoderError: If the encoder has no text tower.
        """
        if self._built.texts is None:
            raise EncoderError(f"encoder {self.name}: has no text tower")
        parts = [
            self._built.texts(list(texts[start : start + _TEXTS_AT_ONCE]), self.device)
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return nn.functional.normalize(torch.cat(parts).float(), dim=-1)

    def num_cut(self, texts: Sequence[str]) -> int | None:
        """Counts the texts that are too long for the text tower, which reads their beginning.

        Returns:
            The number; None for the encoders of the authors' own packages, where it is not known.
        """
        count = self._built.num_cut
        return None if count is None else count(list(texts))

    @property
    def logit_scale(self) -> float:
        """Factor of cosines in the softmax over texts; CLIP's maximum, 100, if none is stored."""
        scale = getattr(self.module, "logit_scale", None)
        return 100.0 if scale is None else float(scale.detach().exp())

    def _compute(
        self, read: Callable[[Tensor], Tensor], images: Sequence[Image] | Tensor
    ) -> Tensor:
        pixels = images if isinstance(images, Tensor) else self.preprocess(images)
        dtype = _DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            return read(pixels.to(self.device)).float().cpu()


def create_encoder(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    feature: str | None = None,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> Encoder:
    """Builds an encoder and loads its weights, which must match exactly.

    Args:
        name: Name of the encoder; the module docstring describes the grammar.
        weights: File or folder of weights, overriding those after `@` in the name; None for a
            folder or repository, which brings its own.
        device: Device; by default a GPU if there is one.
        precision: `float32`, `float16` or `bfloat16`. By default that of the preset on a GPU, and
            float32 on a CPU, where half precision is slow or missing.
        feature: How the output becomes a vector, overriding the preset, see `Preset.feature`.
        trust_remote_code: Whether code from the hub's repository may run.
        **arguments: Arguments of the architecture that override those of the preset.

    Raises:
        EncoderError: If model or transform are unknown, or a package is missing.
        UnknownEncoderError: If the name is neither a preset nor a folder.
        FileNotFoundError: If weights are missing or cannot be downloaded.
        CheckpointError: If the weights do not fit.

    Example:
        >>> from PIL import Image
        >>> tiny = dict(embed_dim=32, depth=1, num_heads=2)
        >>> import tempfile, timm, torch
        >>> model = timm.create_model(
        ...     "vit_large_patch16_224", num_classes=0, init_values=1e-5, **tiny
        ... )
        >>> file = tempfile.mkdtemp() + "/uni.bin"
        >>> torch.save(model.state_dict(), file)
        >>> encoder = create_encoder("uni", file, **tiny)
        >>> encoder.features([Image.new("RGB", (256, 256))]).shape
        torch.Size([1, 32])
    """
    if precision is not None and precision not in _DTYPES:
        raise EncoderError(f"precision {precision!r}: expected one of {', '.join(_DTYPES)}")
    parsed = _recognise(name)
    preset = get_preset(parsed.model) if parsed.library == "preset" else None
    built, reading = _build(parsed, weights, feature, trust_remote_code, arguments)
    place = choose_device(device)
    return Encoder(
        parsed.model if preset else f"{parsed.library}:{parsed.model}",
        built,
        feature=reading,
        patch_px=preset.patch_px if preset else None,
        mpp=preset.mpp if preset else (),
        precision=precision or _default_precision(preset, place),
        device=place,
    )


def default_precision(name: str, device: str | torch.device) -> str:
    """Returns the precision of `create_encoder` on a device, without building the encoder.

    Raises:
        EncoderError: If the name is not valid.
    """
    parsed = _recognise(name)
    preset = get_preset(parsed.model) if parsed.library == "preset" else None
    return _default_precision(preset, torch.device(device))


def _default_precision(preset: Preset | None, device: torch.device) -> str:
    return preset.precision if preset is not None and device.type != "cpu" else "float32"


def open_image_tower(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    feature: str | None = None,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> Tower:
    """Opens the image tower of an encoder, not frozen, for fine-tuning or access to its tokens.

    See `create_encoder` for arguments and errors.
    """
    built, reading = _build(_recognise(name), weights, feature, trust_remote_code, arguments)
    tower = built.tower or Tower(built.module, built.features, built.embed_dim, reading)
    return replace(tower, files=built.files)


def find_transform(name: str) -> Transform:
    """Returns the transform of an encoder; builds the encoder only if its preset does not say.

    Raises:
        EncoderError: If model or transform are unknown, or a package is missing.

    Example:
        >>> find_transform("uni").resize_px, find_transform("uni").output_px
        (224, 224)
    """
    parsed = _recognise(name)
    if parsed.library == "preset" and (known := get_preset(parsed.model).transform) is not None:
        return known
    return _build(parsed, None, None, False, {})[0].transform


def _recognise(name: str) -> EncoderName:
    parsed = EncoderName.parse(name)
    return _recognise_folder(Path(parsed.model)) if parsed.library == "folder" else parsed


def _build(
    parsed: EncoderName,
    weights: str | os.PathLike[str] | None,
    feature: str | None,
    trust_remote_code: bool,
    arguments: dict[str, Any],
) -> tuple[Network, str]:
    given = os.fspath(weights) if weights is not None else parsed.weights
    if parsed.library == "preset":
        preset = get_preset(parsed.model)
        reading = feature or preset.feature
        return _build_preset(preset, given, reading, trust_remote_code, arguments)
    if given and _brings_weights(parsed):
        raise EncoderError(
            f"encoder {parsed.library}:{parsed.model}: weights {given}: expected none, because "
            "this folder or repository brings its own; name a folder that holds these weights"
        )
    if parsed.library == "timm":
        return _build_timm(parsed.model, given, feature, arguments)
    if parsed.library == "hf":
        _check_no_arguments(f"hf:{parsed.model}", arguments)
        return _build_transformers(parsed.model, feature, trust_remote_code)
    return _build_open_clip(parsed.model, given, feature or "projected", arguments)


def _brings_weights(parsed: EncoderName) -> bool:
    """Returns whether a name denotes a folder or a repository, and not an architecture alone."""
    if parsed.library == "timm" and Path(parsed.model).is_dir():
        return True
    return parsed.library == "hf" or parsed.model.startswith(("local-dir:", *_HUB_PREFIXES))


def _check_no_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise EncoderError(
            f"encoder {name}: argument {min(arguments)!r}: expected none, because its config or "
            "package defines the architecture"
        )


# --- presets ------------------------------------------------------------------------------------


def _build_preset(
    preset: Preset, weights: str, feature: str, trust_remote_code: bool, arguments: dict[str, Any]
) -> tuple[Network, str]:
    if preset.remote_code and not trust_remote_code:
        raise EncoderError(
            f"encoder {preset.name}: its network is code in {preset.hub}, which runs on this "
            "machine; read it, then pass trust_remote_code=True"
        )
    if preset.library in ("package", "transformers"):
        _check_no_arguments(preset.name, arguments)
    if preset.library == "package":
        return _build_package(preset, weights, feature), feature
    if preset.library == "transformers":
        return _build_transformers(weights or preset.hub, feature, trust_remote_code, preset=preset)
    if preset.library == "open_clip":
        names = _open_clip_names(preset, weights)
        return _build_open_clip(*names, feature, arguments, preset=preset)
    file = weights_file(preset, weights)
    state_dict = read_state_dict(file, mmap=True)
    architecture, settings = preset.architecture, {**preset.arguments, **arguments}
    transform = preset.transform
    if transform is None:
        config = _timm_config(file)
        architecture, transform = config.architecture, config.transform
        settings = {**config.arguments, **settings}
    description = {"library": preset.library, "architecture": architecture, "arguments": settings}
    return _network(description, feature, state_dict, transform, preset.name, file)


def _network(
    description: dict[str, Any],
    feature: str | None,
    state_dict: Mapping[str, Tensor],
    transform: Transform,
    name: str,
    file: Path,
) -> tuple[Network, str]:
    description = {**description, "feature": feature} if feature else description
    tower = open_tower(description, state_dict, name=name, source=file)
    module = tower.module.eval()
    return (
        Network(module, tower.features, transform, tower.embed_dim, (file,), tower=tower),
        tower.feature,
    )


def _known_transform(preset: Preset) -> Transform:
    if preset.transform is None:
        raise EncoderError(f"{preset.origin}: transform 'config' is for models of timm")
    return preset.transform


class PublishedWeights(Protocol):
    """What a preset says about its weights; see `Preset`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def hub(self) -> str: ...  # noqa: D102
    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102


def weights_file(preset: PublishedWeights, weights: str) -> Path:
    """Returns the file of a preset's weights: the one given, in the folder given, or from the hub.

    Raises:
        FileNotFoundError: If there is none.
    """
    names = [*preset.files, *_TIMM_WEIGHTS]
    if weights:
        path = Path(weights).expanduser()
        if path.is_dir():
            found = next((path / name for name in names if (path / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(
                    f"encoder {preset.name}: no {' or '.join(dict.fromkeys(names))} in {path}"
                )
            return found
        if not path.is_file():
            raise FileNotFoundError(f"encoder {preset.name}: weights {path}: no such file")
        return path
    if not preset.hub:
        raise FileNotFoundError(
            f"encoder {preset.name}: its weights are not on the hub; fetch {preset.files[0]} from "
            f"{preset.source} and name it: {preset.name}@/path/to/{preset.files[0]}"
        )
    return _from_hub(preset.hub, preset.files, name=preset.name)


def _from_hub(repository: str, names: Sequence[str], *, name: str) -> Path:
    """Returns the first file that exists in a repository, downloaded unless it is cached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    repository, _, revision = repository.partition("@")
    reason: Exception | None = None
    for file in names:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except EntryNotFoundError as error:
            reason = error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = error
            break
    unreached = isinstance(reason, LocalEntryNotFoundError)
    cause = "the hub was not reached" if unreached else type(reason).__name__
    raise FileNotFoundError(
        f"encoder {name}: {names[0]} of {repository} is not in the hub's cache and cannot be "
        f"fetched ({cause}). If the weights are gated, accept the terms at "
        f"https://huggingface.co/{repository} and set HF_TOKEN; or name a file: "
        f"{name}@/path/to/{names[0]}"
    ) from reason


# --- timm ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TimmConfig:
    architecture: str
    arguments: dict[str, Any]
    transform: Transform


def _timm_config(file: Path) -> _TimmConfig:
    """Reads the `config.json` that timm writes with the weights."""
    path = file.with_name("config.json")
    if not path.is_file():
        raise EncoderError(
            f"{file}: no config.json beside it, so the images that the model expects are not "
            "known; put the model's config.json there, or use a preset"
        )
    config = read_json(path, what="timm config")
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise EncoderError(f"{path}: no `architecture`, which timm writes")
    defaults = {"global_pool": config["global_pool"]} if config.get("global_pool") else {}
    transform = Transform.from_timm(config.get("pretrained_cfg") or {}, source=str(path))
    return _TimmConfig(architecture, {**defaults, **config.get("model_args", {})}, transform)


def _build_timm(
    model: str, weights: str, feature: str | None, arguments: dict[str, Any]
) -> tuple[Network, str]:
    import timm
    from timm.models import get_pretrained_cfg

    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        file = _in_folder(folder, _TIMM_WEIGHTS)
        config = _timm_config(file)
        state_dict = read_state_dict(file, mmap=True)
        description = {
            "library": "timm",
            "architecture": config.architecture,
            "arguments": {**config.arguments, **arguments},
        }
        return _network(description, feature, state_dict, config.transform, model, file)
    hub = model.startswith(_HUB_PREFIXES)
    if hub and not weights:
        repository = model.partition(":")[2]
        file = _from_hub(repository, _TIMM_WEIGHTS, name=f"timm:{model}")
        _from_hub(repository, ["config.json"], name=f"timm:{model}")
        return _build_timm(str(file.parent), "", feature, arguments)
    if not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        raise EncoderError(f"encoder timm:{model}: timm has no such model{hint}")
    _, _, tag = model.partition(".")
    known = get_pretrained_cfg(model)
    if weights and not tag:
        file = Path(weights).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"encoder timm:{model}: weights {file}: no such file")
        transform = _timm_config(file).transform
    elif known is None:
        raise EncoderError(f"encoder timm:{model}: timm knows no weights of this name")
    else:
        transform = Transform.from_timm(known.to_dict(), source=f"timm:{model}")
    if weights:
        file = Path(weights).expanduser()
        state_dict = read_state_dict(file, mmap=True)
    else:
        assert known is not None
        if not known.hf_hub_id:
            raise EncoderError(f"encoder timm:{model}: timm has no weights of it; name a file")
        names = [n for n in (known.hf_hub_filename, *_TIMM_WEIGHTS) if n]
        file = _from_hub(known.hf_hub_id, names, name=f"timm:{model}")
        state_dict = read_state_dict(file, mmap=True)
    description = {"library": "timm", "architecture": model, "arguments": arguments}
    return _network(description, feature, state_dict, transform, f"timm:{model}", file)


def _in_folder(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"encoder {folder}: no {' or '.join(names)} in this folder")


def _recognise_folder(folder: Path) -> EncoderName:
    """Recognises the library that wrote a folder; `train-clip` writes subfolders of two."""
    if (folder / "open_clip" / _OPEN_CLIP_CONFIG).is_file():
        return EncoderName("open_clip", f"local-dir:{folder / 'open_clip'}")
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        return EncoderName("open_clip", f"local-dir:{folder}")
    config = folder / "config.json"
    if config.is_file():
        content = read_json(config, what="encoder config")
        if "architecture" in content:
            return EncoderName("timm", str(folder))
        if "model_type" in content or "vision_config" in content:
            return EncoderName("hf", str(folder))
    raise EncoderError(
        f"encoder {folder}: neither {_OPEN_CLIP_CONFIG} nor a config.json of timm or transformers"
    )


# --- transformers -------------------------------------------------------------------------------


def _build_transformers(
    model: str, feature: str | None, trust_remote_code: bool, *, preset: Preset | None = None
) -> tuple[Network, str]:
    name = preset.name if preset else f"hf:{model}"
    folder = Path(model).expanduser()
    if folder.is_dir():
        model = str(folder)
    elif model[:1] in ("/", ".", "~") or model.count("/") > 1:
        raise FileNotFoundError(f"encoder {name}: no such folder: {folder}")
    known = preset.transform if preset else None
    files = tuple(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))
    files = files if folder.is_dir() else ()
    content = read_json(folder / "config.json", what="encoder config") if files else {}
    texts, num_cut = None, None
    if content and "model_type" not in content:  # PA-LLaVA's released PLIP; AutoModel needs it
        values = vision_config(content, str(folder / "config.json"))
        tower = open_tower(
            {"library": "transformers", "config": values, "feature": feature},
            read_state_dict(folder),
            name=name,
            source=folder,
        )
        module, joint = tower.module, None
    else:
        module, tower = _load_transformers(model, feature, trust_remote_code, name, preset)
        joint = tower.features if tower.feature == "projected" else None
        if joint is None and hasattr(module, "get_image_features"):
            joint = _transformers_tower(module, "projected", None).features
        if hasattr(module, "get_text_features"):
            texts, num_cut = _transformers_texts(module, model)
    transform = known or _hugging_face_transform(model, name)
    embed_dim = tower.embed_dim or (preset.embed_dim if preset else 0)
    return (
        Network(module, tower.features, transform, embed_dim, files, joint, texts, tower, num_cut),
        tower.feature,
    )


def _load_transformers(
    model: str, feature: str | None, trust_remote_code: bool, name: str, preset: Preset | None
) -> tuple[nn.Module, Tower]:
    from transformers import AutoModel

    try:
        module, report = AutoModel.from_pretrained(
            model, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else EncoderError
        raise kind(
            f"encoder {name}: transformers cannot load {model}: {str(error).splitlines()[0]}"
        ) from error
    if feature is None:
        two_towers = hasattr(module, "get_image_features")
        feature = "projected" if two_towers else default_feature(module.config.model_type)
    check_loading_report(
        report,
        module,
        what=f"encoder {name}",
        source=model,
        # Many ViTs are published without a pooler, which only the feature `pooler` needs.
        unused=lambda key: feature != "pooler" and key.split(".")[0] == "pooler",
    )
    if feature == "conch":  # TITAN's repository contains CONCH v1.5, its patch encoder
        tower, _ = module.return_conch()
        return module, Tower(tower, tower, preset.embed_dim if preset else 0, feature)
    try:
        return module, _transformers_tower(module, feature, preset)
    except EncoderError as error:
        raise EncoderError(f"encoder {name}: {error}") from error


def _transformers_tower(module: Any, feature: str, preset: Preset | None) -> Tower:
    """Returns the image tower of a model, which shares the model's weights."""
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    prefix = preset.num_prefix_tokens if preset else None
    model_type = module.config.model_type
    own_code = type(module).__module__.startswith("transformers.models.")
    if model_type not in (*VISION_TYPES, *POOLED_TYPES) or not own_code:
        return transformers_tower(module, feature, {}, prefix)
    values = vision_config(module.config.to_dict())
    if model_type != "clip":
        drop_unread(module, feature)
        return transformers_tower(module, feature, values, prefix)
    kind = CLIPVisionModelWithProjection if feature == "projected" else CLIPVisionModel
    config = module.vision_model.config
    config.projection_dim = module.config.projection_dim
    with torch.device("meta"):
        tower = kind(config).eval()
    tower.vision_model = module.vision_model
    if feature == "projected":
        tower.visual_projection = module.visual_projection
    return transformers_tower(tower, feature, values, prefix)


def _hugging_face_transform(model: str, name: str) -> Transform:
    from transformers.image_processing_utils import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError as error:
        raise EncoderError(
            f"encoder {name}: no preprocessor_config.json in {model}, so the images that the model "
            "expects are not known"
        ) from error
    return Transform.from_hugging_face(processor, source=f"{model}: preprocessor_config.json")


def _transformers_texts(
    module: Any, model: str
) -> tuple[Callable[[list[str], torch.device], Tensor] | None, Callable[[list[str]], int] | None]:
    """Returns `texts` and `num_cut` of `Network`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, TypeError):  # TypeError if files of a slow tokenizer are missing
        logger.warning("%s: no tokenizer, so texts cannot be encoded", model)
        return None, None
    length = int(module.config.text_config.max_position_embeddings)
    # SigLIP was trained with all texts padded to full length and without a padding mask.
    padding = "max_length" if "siglip" in module.config.model_type else True

    def encode(texts: list[str], device: torch.device) -> Tensor:
        tokens = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        given = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask") if k in tokens}
        return module.get_text_features(**given)

    def num_cut(texts: list[str]) -> int:
        return sum(len(ids) > length for ids in tokenizer(texts, verbose=False)["input_ids"])

    return encode, num_cut


# --- open_clip ----------------------------------------------------------------------------------


def _open_clip_names(preset: Preset, weights: str) -> tuple[str, str]:
    """Returns the model name and weights of a preset as open_clip expects them."""
    path = Path(weights).expanduser()
    if weights and path.is_dir() and (path / _OPEN_CLIP_CONFIG).is_file():
        return f"local-dir:{path}", ""
    if preset.architecture:
        return preset.architecture, str(weights_file(preset, weights))
    if weights:
        raise EncoderError(
            f"encoder {preset.name}: weights {weights}: expected a folder with {_OPEN_CLIP_CONFIG}"
        )
    return f"hf-hub:{preset.hub}", ""


def _build_open_clip(
    model: str,
    weights: str,
    feature: str,
    arguments: Mapping[str, Any],
    *,
    preset: Preset | None = None,
) -> tuple[Network, str]:
    import open_clip
    from open_clip.model import CLIP, CustomTextCLIP

    name = preset.name if preset else f"open_clip:{model}"
    if unknown := set(arguments) - {"image_size"}:
        raise EncoderError(f"encoder {name}: argument {min(unknown)!r}, expected image_size")
    files = _open_clip_files(model, weights, name)
    given = bool(files and weights)
    disabled = logging.root.manager.disable
    if given:  # open_clip would warn that weights are random, but they are loaded below
        logging.disable(logging.WARNING)
    try:
        module = open_clip.create_model(
            model,
            pretrained=None if given else weights or None,
            force_image_size=arguments.get("image_size"),
        )
        tokenizer = open_clip.get_tokenizer(model)
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if "state_dict" in message:
            raise CheckpointError(f"encoder {name}: {weights or model}: {message:.600}") from error
        raise FileNotFoundError(f"encoder {name}: {message:.300}") from error
    except OSError as error:
        raise FileNotFoundError(f"encoder {name}: {str(error).splitlines()[0]}") from error
    finally:
        logging.disable(disabled)
    if given:
        _load_open_clip(module, files[0], model, name)
    transform = preset.transform if preset and preset.transform else None
    try:
        transform = transform or Transform.from_open_clip(
            module.visual.preprocess_cfg, source=f"encoder {name}"
        )
    except TransformError as error:
        raise EncoderError(str(error)) from error
    joint = module.encode_image
    tower = None
    if type(module) in (CLIP, CustomTextCLIP):
        config = open_clip_config(model)
        size = module.visual.image_size
        if isinstance(size, tuple) and size[0] == size[1]:  # a number for the ResNets
            size = size[0]
        sized = {**config["vision_cfg"], "image_size": size}
        tower = open_clip_tower(module.visual, {**config, "vision_cfg": sized}, feature)
        joint = joint if feature == "projected" else None
    elif feature != "projected":
        raise EncoderError(f"encoder {name}: feature {feature!r}, expected projected")
    return (
        Network(
            module,
            tower.features if tower else module.encode_image,
            transform,
            tower.embed_dim if tower else int(module.visual.output_dim),
            files,
            joint,
            lambda texts, device: module.encode_text(tokenizer(texts).to(device)),
            tower,
            partial(num_cut_by_open_clip, tokenizer),
        ),
        feature,
    )


def num_cut_by_open_clip(tokenizer: Any, texts: list[str]) -> int:
    """Counts the texts that a tokenizer of open_clip cuts, see `Encoder.num_cut`."""
    # A cut text ends in an end mark in place of a token, or goes on where there is one more place.
    length = tokenizer.context_length
    cut, longer = tokenizer(texts), tokenizer(texts, context_length=length + 1)
    padding = tokenizer([""], context_length=length + 1)[0, -1]
    return int(((cut != longer[:, :length]).any(dim=1) | (longer[:, -1] != padding)).sum())


def _open_clip_files(model: str, weights: str, name: str) -> tuple[Path, ...]:
    """Returns the file of the weights; none if open_clip downloads them itself."""
    import open_clip

    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / _OPEN_CLIP_CONFIG).is_file():
            raise FileNotFoundError(f"encoder {folder}: no {_OPEN_CLIP_CONFIG} in this folder")
        return (_in_folder(folder, _OPEN_CLIP_WEIGHTS),)
    if not model.startswith("hf-hub:"):
        open_clip_config(model)  # raises for an unknown architecture
        if not weights:
            raise EncoderError(
                f"encoder {name}: without weights it would be random; name a tag or a file: "
                f"open_clip:{model}@WEIGHTS"
            )
        if Path(weights).expanduser().is_file():
            return (Path(weights).expanduser(),)
        if weights not in (tags := open_clip.list_pretrained_tags_by_model(model)):
            raise FileNotFoundError(
                f"encoder {name}: {weights} is neither a file nor one of {', '.join(tags)}"
            )
        if open_clip.get_pretrained_cfg(model, weights).get("quick_gelu"):
            check_quick_gelu(open_clip_config(model), model, weights, name)
    return ()


def _load_open_clip(module: Any, file: Path, model: str, name: str) -> None:
    """Loads a checkpoint of a whole CLIP strictly, including OpenAI's TorchScript archives."""
    from open_clip.convert import convert_state_dict
    from open_clip.factory import resize_pos_embed, resize_text_pos_embed
    from open_clip.model import convert_to_custom_text_state_dict

    found = read_state_dict(file)
    state_dict = {k: v for k, v in found.items() if k not in OPENAI_ENTRIES}
    if len(state_dict) < len(found):
        check_quick_gelu(open_clip_config(model), model, file, name)
    state_dict = convert_state_dict(module, state_dict)
    if "positional_embedding" in state_dict and not hasattr(module, "positional_embedding"):
        state_dict = convert_to_custom_text_state_dict(state_dict)
    # Constants that are not weights: transformers before 4.31 stored the first, TorchScript the
    # second.
    for constant in ("text.transformer.embeddings.position_ids", "attn_mask"):
        state_dict.pop(constant, None)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state_dict and getattr(module, scalar, None) is not None:
            state_dict[scalar] = state_dict[scalar].reshape(getattr(module, scalar).shape)
    resize_pos_embed(state_dict, module)
    resize_text_pos_embed(state_dict, module)
    load_strict(module, state_dict, what=f"encoder {name}", source=str(file))


# --- packages of the authors --------------------------------------------------------------------


def _build_package(preset: Preset, weights: str, feature: str) -> Network:
    if importlib.util.find_spec(preset.package) is None:
        raise EncoderError(
            f"encoder {preset.name}: needs the package {preset.package} of its authors; install "
            f"it by `{preset.install}`"
        )
    file = weights_file(preset, weights)
    build = {"conch": _conch, "musk": _musk}[preset.architecture]
    return build(preset, file, feature)


def _conch(preset: Preset, file: Path, feature: str) -> Network:
    """Builds CONCH with its package: `joint` is the contrastive projection, `features` is not."""
    from conch.open_clip_custom import (
        create_model_from_pretrained,
        get_tokenizer,
        tokenize,
    )

    module, _ = create_model_from_pretrained("conch_ViT-B-16", str(file))
    tokenizer = get_tokenizer()
    projected = feature == "projected"
    return Network(
        module,
        lambda pixels: module.encode_image(pixels, proj_contrast=projected, normalize=False),
        _known_transform(preset),
        preset.embed_dim,
        (file,),
        lambda pixels: module.encode_image(pixels, proj_contrast=True, normalize=True),
        lambda texts, device: module.encode_text(
            tokenize(texts=texts, tokenizer=tokenizer).to(device)
        ),
    )


def _musk(preset: Preset, file: Path, feature: str) -> Network:
    """Builds MUSK with its package: `features` may join two scales, `joint` uses the head."""
    from musk import modeling, utils  # noqa: F401  (registers musk_large_patch16_384 in timm)
    from timm.models import create_model

    module = create_model("musk_large_patch16_384")
    utils.load_model_and_may_interpolate(str(file), module, "model|module", "")
    multiscale = feature == "multiscale"

    def read(pixels: Tensor, *, joint: bool) -> Tensor:
        return module(
            image=pixels, with_head=joint, out_norm=joint, ms_aug=multiscale and not joint,
            return_global=True,
        )[0]  # fmt: skip

    return Network(
        module,
        lambda pixels: read(pixels, joint=False),
        _known_transform(preset),
        preset.embed_dim,
        (file,),
        lambda pixels: read(pixels, joint=True),
    )

"""Builds an encoder from its name and computes its features.

The grammar of names, the same in every command:

- ``uni2-h``: a preset, with weights from the Hugging Face hub
- ``uni2-h@/path/to/weights``: a preset with weights from a file or a folder
- ``timm:vit_base_patch16_224.augreg_in21k``: a model of timm, with ``@FILE`` its weights
- ``hf:owner/name`` or ``hf:/path/to/folder``: a model of transformers
- ``open_clip:ViT-B-16@laion2b_s34b_b88k``: a model of open_clip with a tag or a file of weights
- ``/path/to/folder``: a folder that one of the three libraries wrote
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pathcore.encoders.layouts import fit_layout, pools_patches
from pathcore.encoders.networks import NETWORKS, uninitialised
from pathcore.encoders.presets import Preset, get_preset
from pathcore.encoders.transform import Transform, TransformError
from pathcore.files import read_json, sha256_of
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


class EncoderError(ValueError):
    """A name that is no encoder, or an encoder that cannot be built here."""


@dataclass(frozen=True)
class EncoderName:
    """A parsed name.

    Attributes:
        library: `preset`, `timm`, `hf`, `open_clip` or `folder`.
        model: Name of the preset, the model or the folder.
        weights: File, folder or tag behind the `@`; empty without one.
    """

    library: str
    model: str
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> EncoderName:
        """Reads a name; see the head of this module for the grammar.

        Raises:
            EncoderError: If it is empty or names an unknown library.
            UnknownEncoderError: If it is no preset and no folder; suggests the nearest presets.

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
            # A folder may hold an @ in its name; a model of timm and open_clip cannot.
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
    """A network and how to read it: what an `Encoder` is built from.

    Attributes:
        module: The network, on the CPU and in evaluation mode.
        features: `(batch, 3, height, width)` to `(batch, embed_dim)`, as the field means the name.
        transform: From images to `pixel_values`.
        embed_dim: Length of the features.
        files: Files of weights; empty where a library fetched them by itself.
        joint: The image's side of the space that images and texts share.
        texts: Texts to `(num_texts, dim)` of that space.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    transform: Transform
    embed_dim: int
    files: tuple[Path, ...] = ()
    joint: Callable[[Tensor], Tensor] | None = None
    texts: Callable[[list[str], torch.device], Tensor] | None = None


class Encoder:
    """A frozen encoder with what belongs to its weights; `create_encoder` builds it.

    Attributes:
        name: Name as it was asked for, without the path of the weights.
        transform: From RGB images to `pixel_values`.
        embed_dim: Length of `features`.
        feature: How the network's output becomes a vector, see `Preset.feature`.
        patch_px: Side of the patches that the authors read from slides; None if they say nothing.
        mpp: Micrometres per pixel of those patches; empty if they say nothing.
        precision: `float32`, `float16` or `bfloat16`: the type in which features are computed.
        device: Where they are computed.
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
        """Side of the images that the network sees; None if it depends on the image."""
        return self.transform.output_px

    @property
    def has_text(self) -> bool:
        """Whether `encode_texts` is there."""
        return self._built.texts is not None

    @property
    def folder_name(self) -> str:
        """Name and digest as the name of a folder, so that other weights get another folder."""
        last = re.split(r"[:/]", self.name)[-1]
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', last)}_{self.digest[:12]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights: of the file, or of the tensors where a library fetched them."""
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
        """Returns what a features file should say about its encoder, as JSON values."""
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
        """Returns `pixel_values`, `(num_images, 3, height, width)` in float32 on the CPU."""
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def features(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Computes what the field means by the encoder's name.

        Args:
            images: RGB images, or `pixel_values` `(batch, 3, height, width)`.

        Returns:
            `(batch, embed_dim)` in float32 on the CPU, not normalised unless the model does it.
        """
        return self._compute(self._built.features, images)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Encodes images for comparison: unit vectors, in the texts' space if there is one.

        Args:
            images: RGB images, or `pixel_values` `(batch, 3, height, width)`.

        Returns:
            `(batch, dim)` in float32 on the CPU, of unit length.
        """
        read = self._built.joint or self._built.features
        return nn.functional.normalize(self._compute(read, images), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts for comparison with images.

        Returns:
            `(num_texts, dim)` in float32 on the CPU, of unit length.

        Raises:
            EncoderError: If the encoder has no text tower.
        """
        if self._built.texts is None:
            raise EncoderError(f"encoder {self.name}: has no text tower")
        parts = [
            self._built.texts(list(texts[start : start + _TEXTS_AT_ONCE]), self.device)
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @property
    def logit_scale(self) -> float:
        """Factor of cosines in the softmax over texts; CLIP's largest, 100, if none is stored."""
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
    """Builds an encoder and loads its weights, all of them or none.

    Args:
        name: A name of the grammar at the head of this module.
        weights: File or folder of weights, in place of what stands behind `@` in the name.
        device: By default a GPU if there is one.
        precision: `float32`, `float16` or `bfloat16`. By default the preset's on a GPU, and
            float32 on a CPU, where half precision is slow or missing.
        feature: Another reading of the output than the preset's, see `Preset.feature`.
        trust_remote_code: Whether code from the hub's repository may run.
        **arguments: Arguments of the architecture in place of the preset's.

    Raises:
        EncoderError: If the model is not known, its transform is not known, or a package is
            missing.
        UnknownEncoderError: If the name is no preset.
        FileNotFoundError: If weights are missing or cannot be fetched.
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
    parsed = EncoderName.parse(name)
    given = os.fspath(weights) if weights is not None else parsed.weights
    if precision is not None and precision not in _DTYPES:
        raise EncoderError(f"precision {precision!r}: expected one of {', '.join(_DTYPES)}")
    if parsed.library == "folder":
        parsed = _recognise_folder(Path(parsed.model))
    preset = get_preset(parsed.model) if parsed.library == "preset" else None
    if preset is not None:
        reading = feature or preset.feature
        built, reading = _build_preset(preset, given, reading, trust_remote_code, arguments)
    elif parsed.library == "timm":
        built, reading = _build_timm(parsed.model, given, feature, arguments)
    elif parsed.library == "hf":
        built, reading = _build_transformers(parsed.model, feature, trust_remote_code)
    else:
        built, reading = _build_open_clip(parsed.model, given), "projected"
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = preset.precision if preset is not None and place.type != "cpu" else "float32"
    return Encoder(
        parsed.model if parsed.library == "preset" else f"{parsed.library}:{parsed.model}",
        built,
        feature=reading,
        patch_px=preset.patch_px if preset else None,
        mpp=preset.mpp if preset else (),
        precision=precision or usual,
        device=place,
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
    if preset.library == "package":
        return _build_package(preset, weights, feature), feature
    if preset.library == "transformers":
        return _build_transformers(weights or preset.hub, feature, trust_remote_code, preset=preset)
    if preset.library == "open_clip":
        return _build_open_clip(*_open_clip_names(preset, weights), preset=preset), "projected"
    file = _weights_file(preset, weights)
    state_dict = read_state_dict(file, mmap=True)
    if preset.library == "own":
        module = uninitialised(lambda: NETWORKS[preset.architecture](**arguments))
        _load(module, state_dict, preset.name, file)
        embed_dim = int(arguments.get("projection_dim", getattr(module, "num_features", 0)))
        own_transform = _known_transform(preset)
        built = Network(module, module, own_transform, embed_dim or preset.embed_dim, (file,))
        return built, feature
    architecture, settings = preset.architecture, {**preset.arguments, **arguments}
    transform = preset.transform
    if transform is None:
        config = _timm_config(file)
        architecture, transform = config.architecture, config.transform
        settings = {**config.arguments, **settings}
    return _timm_tower(architecture, settings, state_dict, feature, transform, preset.name, file)


def _known_transform(preset: Preset) -> Transform:
    if preset.transform is None:
        raise EncoderError(f"{preset.origin}: transform 'config' is for models of timm")
    return preset.transform


def _weights_file(preset: Preset, weights: str) -> Path:
    """Returns the file of a preset's weights, given, in a folder, or from the hub."""
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
    """Fetches the first of some files from the hub, or takes it from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

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
    raise FileNotFoundError(
        f"encoder {name}: {names[0]} of {repository} is not in the hub's cache and cannot be "
        f"fetched ({type(reason).__name__}). Accept the terms at "
        f"https://huggingface.co/{repository} and set HF_TOKEN, or name a file: "
        f"{name}@/path/to/{names[0]}"
    ) from reason


def _load(module: nn.Module, state_dict: Mapping[str, Tensor], name: str, source: object) -> None:
    """Loads published weights strictly, and says what of the file was not needed."""
    fitted = fit_layout(state_dict, module)
    load_strict(module, fitted.state_dict, what=f"encoder {name}", source=str(source))
    if dropped := fitted.describe():
        logger.info("encoder %s: %s: dropped %s", name, source, dropped)


# --- timm ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TimmConfig:
    architecture: str
    arguments: dict[str, Any]
    transform: Transform


def _timm_config(file: Path) -> _TimmConfig:
    """Reads the `config.json` that timm writes beside weights."""
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
        settings = {**config.arguments, **arguments}
        return _timm_tower(
            config.architecture, settings, state_dict, feature, config.transform, model, file
        )
    hub = model.startswith(_HUB_PREFIXES)
    if hub and not weights:
        repository = model.partition(":")[2]
        file = _from_hub(repository, _TIMM_WEIGHTS, name=f"timm:{model}")
        _from_hub(repository, ["config.json"], name=f"timm:{model}")
        return _build_timm(str(file.parent), "", feature, arguments)
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('.')[0].split('_')[0]}*")[:5]
        hint = f"; for example {', '.join(near)}" if near else ""
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
    return _timm_tower(model, arguments, state_dict, feature, transform, f"timm:{model}", file)


def _timm_tower(
    architecture: str,
    arguments: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    feature: str | None,
    transform: Transform,
    name: str,
    file: Path,
) -> tuple[Network, str]:
    import timm
    from timm import layers

    settings = {"num_classes": 0, **arguments}
    if isinstance(settings.get("mlp_layer"), str):
        settings["mlp_layer"] = getattr(layers, settings["mlp_layer"])
    if isinstance(settings.get("act_layer"), str):
        settings["act_layer"] = layers.get_act_layer(settings["act_layer"])
    if pools_patches(state_dict):
        if feature not in (None, "class", "mean"):
            raise CheckpointError(
                f"{file}: was fine-tuned on the mean of its patch tokens (fc_norm), so {feature!r} "
                "was never trained; use feature='mean'"
            )
        # The class token of such a model has no norm of its own, see `pools_patches`.
        settings["global_pool"], feature = "avg", "mean"
    module = uninitialised(lambda: timm.create_model(architecture, pretrained=False, **settings))
    _load(module, state_dict, name, file)
    feature = feature or ("class" if hasattr(module, "cls_token") else "output")
    read = _timm_reading(module, feature, name)
    embed_dim = _timm_dim(module, feature)
    return Network(module, read, transform, embed_dim, (file,)), feature


def _timm_reading(module: Any, feature: str, name: str) -> Callable[[Tensor], Tensor]:
    """Returns the function from `pixel_values` to the vector that `feature` names."""
    if feature == "output":
        return lambda pixels: module(pixels)
    if feature == "layer3":  # CLAM reads a ResNet after its third stage

        def third_stage(pixels: Tensor) -> Tensor:
            maps = module.forward_intermediates(pixels, indices=[3], intermediates_only=True)
            return maps[0].mean((-2, -1))

        return third_stage
    if not hasattr(module, "num_prefix_tokens"):
        raise EncoderError(
            f"encoder {name}: {type(module).__name__} has no tokens, so feature={feature!r} "
            "cannot be read; use feature='output'"
        )
    prefix = int(module.num_prefix_tokens)

    def tokens(pixels: Tensor) -> Tensor:
        return module.forward_features(pixels)

    def mean(pixels: Tensor) -> Tensor:
        # With `avg` pooling timm normalises after the mean (fc_norm), else each token before it.
        if module.global_pool == "avg":
            return module(pixels)
        return tokens(pixels)[:, prefix:].mean(1)

    def class_and_mean(pixels: Tensor) -> Tensor:
        found = tokens(pixels)
        # Registers stand between the class token and the patches, and belong to neither.
        return torch.cat([found[:, 0], found[:, prefix:].mean(1)], dim=-1)

    readings = {
        "class": lambda pixels: tokens(pixels)[:, 0],
        "mean": mean,
        "class+mean": class_and_mean,
    }
    if feature not in readings:
        raise EncoderError(
            f"encoder {name}: feature {feature!r}, expected one of {', '.join(readings)}, output"
        )
    return readings[feature]


def _timm_dim(module: Any, feature: str) -> int:
    if feature == "layer3":
        return int(module.feature_info[3]["num_chs"])
    return int(module.num_features) * (2 if feature == "class+mean" else 1)


def _in_folder(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"encoder {folder}: no {' or '.join(names)} in this folder")


def _recognise_folder(folder: Path) -> EncoderName:
    """Tells which library wrote a folder; `train-clip` writes `open_clip/` and `hf/` inside one."""
    if (folder / "open_clip" / _OPEN_CLIP_CONFIG).is_file():
        return EncoderName("open_clip", f"local-dir:{folder / 'open_clip'}")
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        return EncoderName("open_clip", f"local-dir:{folder}")
    config = folder / "config.json"
    if config.is_file():
        content = read_json(config, what="encoder config")
        if "architecture" in content:
            return EncoderName("timm", str(folder))
        if "model_type" in content:
            return EncoderName("hf", str(folder))
    raise EncoderError(
        f"encoder {folder}: neither {_OPEN_CLIP_CONFIG} nor a config.json of timm or transformers"
    )


# --- transformers -------------------------------------------------------------------------------


def _build_transformers(
    model: str, feature: str | None, trust_remote_code: bool, *, preset: Preset | None = None
) -> tuple[Network, str]:
    from transformers import AutoModel

    name = preset.name if preset else f"hf:{model}"
    folder = Path(model).expanduser()
    if folder.is_dir():
        model = str(folder)
    elif model[:1] in ("/", ".", "~") or model.count("/") > 1:
        raise FileNotFoundError(f"encoder {name}: no such folder: {folder}")
    try:
        module, report = AutoModel.from_pretrained(
            model, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else EncoderError
        raise kind(
            f"encoder {name}: transformers cannot load {model}: {str(error).splitlines()[0]}"
        ) from error
    two_towers = hasattr(module, "get_image_features")
    feature = feature or ("projected" if two_towers else "class")
    check_loading_report(
        report,
        module,
        what=f"encoder {name}",
        source=model,
        # Many ViTs are published without the pooler that only their class token's readers skip.
        unused=lambda key: feature != "pooler" and key.split(".")[0] == "pooler",
    )
    transform = preset.transform if preset else None
    transform = transform or _hugging_face_transform(model, name)
    read, embed_dim = _transformers_reading(module, feature, name, preset)
    files = tuple(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))
    joint = module.get_image_features if two_towers else None
    texts = _transformers_texts(module, model) if hasattr(module, "get_text_features") else None
    return (
        Network(
            module, read, transform, embed_dim, files if folder.is_dir() else (),
            None if joint is None else (lambda pixels: joint(pixel_values=pixels)), texts,
        ),
        feature,
    )  # fmt: skip


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


def _transformers_reading(
    module: Any, feature: str, name: str, preset: Preset | None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Returns the function from `pixel_values` to the vector `feature`, and its length."""
    if feature == "projected":
        return (
            lambda pixels: module.get_image_features(pixel_values=pixels),
            _projection_dim(module),
        )
    if feature == "conch":  # TITAN's repository holds CONCH v1.5, its patch encoder
        tower, _ = module.return_conch()
        return lambda pixels: tower(pixels), preset.embed_dim if preset else 0
    if feature == "output":
        return lambda pixels: module(pixels), preset.embed_dim if preset else 0
    tower = getattr(module, "vision_model", module)
    hidden = int(getattr(tower.config, "hidden_size", 0))
    prefix = 1 + int(getattr(tower.config, "num_register_tokens", 0) or 0)
    if preset is not None and preset.num_prefix_tokens is not None:
        prefix = preset.num_prefix_tokens

    def outputs(pixels: Tensor) -> Any:
        return tower(pixel_values=pixels)

    def class_and_mean(pixels: Tensor) -> Tensor:
        tokens = outputs(pixels).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=-1)

    readings: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        "class": (lambda pixels: outputs(pixels).last_hidden_state[:, 0], hidden),
        "mean": (lambda pixels: outputs(pixels).last_hidden_state[:, prefix:].mean(1), hidden),
        "class+mean": (class_and_mean, 2 * hidden),
        "pooler": (lambda pixels: outputs(pixels).pooler_output, hidden),
    }
    if feature not in readings:
        raise EncoderError(
            f"encoder {name}: feature {feature!r}, expected one of {', '.join(readings)}, projected"
        )
    return readings[feature]


def _projection_dim(module: Any) -> int:
    config = module.config
    found: Any = getattr(config, "projection_dim", None)
    if found is None:  # SigLIP pools into its hidden size
        found = config.vision_config.hidden_size
    return int(found)


def _transformers_texts(
    module: Any, model: str
) -> Callable[[list[str], torch.device], Tensor] | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, TypeError):  # TypeError: a slow tokenizer without its files
        logger.warning("%s: no tokenizer, so texts cannot be encoded", model)
        return None
    length = int(module.config.text_config.max_position_embeddings)
    # SigLIP was trained with every text padded to full length, and without a padding mask.
    padding = "max_length" if "siglip" in module.config.model_type else True

    def encode(texts: list[str], device: torch.device) -> Tensor:
        tokens = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        given = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask") if k in tokens}
        return module.get_text_features(**given)

    return encode


# --- open_clip ----------------------------------------------------------------------------------


def _open_clip_names(preset: Preset, weights: str) -> tuple[str, str]:
    """Returns open_clip's name of a preset's architecture, and its weights."""
    path = Path(weights).expanduser()
    if weights and path.is_dir() and (path / _OPEN_CLIP_CONFIG).is_file():
        return f"local-dir:{path}", ""
    if preset.architecture:
        return preset.architecture, str(_weights_file(preset, weights))
    if weights:
        raise EncoderError(
            f"encoder {preset.name}: weights {weights}: expected a folder with {_OPEN_CLIP_CONFIG}"
        )
    return f"hf-hub:{preset.hub}", ""


def _build_open_clip(model: str, weights: str, *, preset: Preset | None = None) -> Network:
    import open_clip

    name = preset.name if preset else f"open_clip:{model}"
    files: tuple[Path, ...] = ()
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / _OPEN_CLIP_CONFIG).is_file():
            raise FileNotFoundError(f"encoder {folder}: no {_OPEN_CLIP_CONFIG} in this folder")
        files = (_in_folder(folder, _OPEN_CLIP_WEIGHTS),)
    elif not model.startswith("hf-hub:"):
        if model not in open_clip.list_models():
            raise EncoderError(f"encoder {name}: open_clip has no architecture {model}")
        if not weights:
            raise EncoderError(
                f"encoder {name}: without weights it would be random; name a tag or a file: "
                f"open_clip:{model}@WEIGHTS"
            )
        if Path(weights).expanduser().is_file():
            files = (Path(weights).expanduser(),)
            read_state_dict(files[0], mmap=True)  # says what the file is if it holds no weights
        elif weights not in (tags := open_clip.list_pretrained_tags_by_model(model)):
            raise FileNotFoundError(
                f"encoder {name}: {weights} is neither a file nor one of {', '.join(tags)}"
            )
    try:
        module = open_clip.create_model(model, pretrained=str(files[0]) if files and weights
                                        else weights or None)  # fmt: skip
        tokenizer = open_clip.get_tokenizer(model)
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if "state_dict" in message:
            raise CheckpointError(f"encoder {name}: {weights or model}: {message:.600}") from error
        raise FileNotFoundError(f"encoder {name}: {message:.300}") from error
    except OSError as error:
        raise FileNotFoundError(f"encoder {name}: {str(error).splitlines()[0]}") from error
    transform = preset.transform if preset and preset.transform else None
    try:
        transform = transform or Transform.from_open_clip(
            module.visual.preprocess_cfg, source=f"encoder {name}"
        )
    except TransformError as error:
        raise EncoderError(str(error)) from error
    return Network(
        module,
        module.encode_image,
        transform,
        preset.embed_dim if preset else int(module.visual.output_dim),
        files,
        module.encode_image,
        lambda texts, device: module.encode_text(tokenizer(texts).to(device)),
    )


# --- packages of the authors --------------------------------------------------------------------


def _build_package(preset: Preset, weights: str, feature: str) -> Network:
    if importlib.util.find_spec(preset.package) is None:
        raise EncoderError(
            f"encoder {preset.name}: needs the package {preset.package} of its authors; install "
            f"it by `{preset.install}`"
        )
    file = _weights_file(preset, weights)
    build = {"conch": _conch, "musk": _musk}[preset.architecture]
    return build(preset, file, feature)


def _conch(preset: Preset, file: Path, feature: str) -> Network:
    """CONCH by its package: pooled features for slides, projected ones beside texts."""
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
    """MUSK by its package: two scales joined for slides, the head's output beside texts."""
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

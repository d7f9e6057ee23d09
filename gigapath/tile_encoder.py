"""Tile encoders of Prov-GigaPath (ViT-g/16) and GigaPath-Flash (ViT-S/16), as models of timm.

The arguments of both architectures are listed here, because timm reads them from the hub even for
`pretrained=False`. Weights come from the hub, a folder in timm's layout (`config.json` with
`model.safetensors` or `pytorch_model.bin`), or a single file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pathcore.encoders.transform import Transform
from pathcore.files import StrPath
from pathcore.names import UnknownNameError, did_you_mean
from pathcore.weights import CheckpointError, check_names, read_state_dict

HUB_NAME = "hf_hub:prov-gigapath/prov-gigapath"
FLASH_HUB_NAME = "hf_hub:prov-gigapath/prov-gigapath-flash"
RANDOM = "random"
"""Name of random weights, as is the empty string."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
RESIZE_PX, CROP_PX = 256, 224
"""Sizes of the published transform, like mean and standard deviation above:
https://github.com/prov-gigapath/prov-gigapath#inference-with-the-tile-encoder."""

_SLIDE_ENCODERS = {"prov-gigapath": HUB_NAME, "gigapath-flash": FLASH_HUB_NAME}
"""Hub name of the slide encoder for each preset of `pathcore.encoders`."""

_HUB_PREFIXES = ("hf_hub:", "hf-hub:")
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TileArchitecture:
    """Arguments that build a tile encoder with timm.

    Attributes:
        timm_name: Name of the model in timm.
        model_args: Arguments of `timm.create_model` as JSON values; layers are given by name.
    """

    timm_name: str
    model_args: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, TileArchitecture] = {
    # Published config.json of prov-gigapath/prov-gigapath.
    "gigapath_tile_enc_vitg16": TileArchitecture(
        "vit_giant_patch14_dinov2",
        {
            "img_size": 224,
            "in_chans": 3,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-05,
            "mlp_ratio": 5.33334,
            "num_classes": 0,
        },
    ),
    # GigaPath-Flash (https://github.com/prov-gigapath/prov-gigapath): SwiGLU of 2 x 1024.
    "gigapath_tile_enc_dinov2s": TileArchitecture(
        "vit_small_patch14_dinov2",
        {
            "img_size": 224,
            "in_chans": 3,
            "patch_size": 16,
            "embed_dim": 384,
            "depth": 12,
            "num_heads": 6,
            "init_values": 1e-05,
            "mlp_ratio": 2048 / 384,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
            "num_classes": 0,
        },
    ),
}
DEFAULT_ARCHITECTURE = "gigapath_tile_enc_vitg16"


@dataclass(frozen=True)
class TileWeights:
    """Files of a tile encoder.

    Attributes:
        path: Weights.
        config: `config.json` in the same folder, if any.
    """

    path: Path
    config: Path | None


def create_model(
    pretrained: StrPath, model_arch: str | None = None, **model_args: Any
) -> nn.Module:
    """Builds a tile encoder and loads its weights, which must match exactly.

    Args:
        pretrained: `hf_hub:OWNER/NAME`, a folder in timm's layout, a file of weights, or `""` for
            random weights.
        model_arch: A key of `ARCHITECTURES`, or the name of a model of timm. By default taken from
            `config.json` or, without one, recognised by the width of the weights; the ViT-g for
            random weights.
        **model_args: Arguments of `timm.create_model` that override those of the architecture.

    Returns:
        The model in evaluation mode; it maps `(batch, 3, height, width)` to `(batch, embed_dim)`.

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
        CheckpointError: If names or shapes differ from the model's. The message lists them.
        ValueError: If the architecture is unknown.

    Example:
        >>> model = create_model("", "gigapath_tile_enc_dinov2s")
        >>> with torch.no_grad():
        ...     model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 384])
    """
    if str(pretrained) in ("", RANDOM):
        return _build(_architecture(model_arch or DEFAULT_ARCHITECTURE), model_args).eval()
    source = find_tile_weights(pretrained)
    state_dict = read_state_dict(source.path, mmap=True)
    architecture = _choose(source, model_arch, state_dict)
    # On the meta device, because initialising a billion parameters at random would take half a
    # minute and twice the memory.
    with torch.device("meta"):
        model = _build(architecture, model_args)
    own = model.state_dict()
    check_names(own, state_dict, what=f"tile encoder {architecture.timm_name}", source=source.path)
    tensors = {name: state_dict[name].to(own[name].dtype) for name in own}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def embedding_width(pretrained: StrPath, model_arch: str | None = None) -> int:
    """Returns the embedding width of the encoder that `create_model` would build.

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
        ValueError: If the architecture is unknown.
    """
    if str(pretrained) in ("", RANDOM):
        architecture = _architecture(model_arch or DEFAULT_ARCHITECTURE)
    else:
        source = find_tile_weights(pretrained)
        architecture = _choose(source, model_arch)
    with torch.device("meta"):
        return int(cast(Any, _build(architecture, {})).num_features)


def tile_transform(crop_px: int = CROP_PX) -> Callable[[Any], Tensor]:
    """Returns the published transform: bicubic resize to 256 px, centre crop, normalisation.

    Args:
        crop_px: Side of the crop; the shorter side of the image is resized to 8/7 of it.

    Returns:
        A function that maps an RGB image of Pillow to `(3, crop_px, crop_px)`.

    Example:
        >>> from PIL import Image
        >>> tile_transform()(Image.new("RGB", (256, 256))).shape
        torch.Size([3, 224, 224])
    """
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.Resize(resize_px(crop_px), interpolation=bicubic),
            transforms.CenterCrop(crop_px),
            transforms.ToTensor(),
            transforms.Normalize(mean=IMAGE_MEAN, std=IMAGE_STD),
        ]
    )


def published_transform(crop_px: int = CROP_PX) -> Transform:
    """Returns the published transform as data; see `tile_transform`."""
    return Transform(resize_px(crop_px), crop_px, "bicubic", IMAGE_MEAN, IMAGE_STD)


def encoder_transform(pretrained: StrPath, model_arch: str | None = None) -> Transform:
    """Returns the preprocessing of the encoder that `create_model` would build.

    Prov-GigaPath and GigaPath-Flash use the published transform, which differs from the
    `pretrained_cfg` in their `config.json`. Any other model must come with its own.

    Args:
        pretrained: Weights, as for `create_model`.
        model_arch: Architecture, as for `create_model`.

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
        ValueError: If the transform is not known.
    """
    import timm  # takes a second

    name = os.fspath(pretrained).replace("hf-hub:", "hf_hub:")
    if name in (HUB_NAME, FLASH_HUB_NAME):
        return published_transform()
    if name in ("", RANDOM):
        arch = model_arch or DEFAULT_ARCHITECTURE
        if arch in ARCHITECTURES:
            return published_transform()
        architecture = _architecture(arch)
        default = timm.get_pretrained_cfg(architecture.timm_name)
        return Transform.from_timm(
            {} if default is None else default.to_dict(), source=f"tile encoder {arch}"
        )
    source = find_tile_weights(pretrained)
    if _is_published(_choose(source, model_arch)):
        return published_transform()
    if source.config is None:
        raise ValueError(
            f"tile encoder {source.path}: the images that it expects are not known; put the "
            "config.json of the model beside it, with mean, std, input_size and interpolation in "
            "its pretrained_cfg"
        )
    config = json.loads(source.config.read_text(encoding="utf-8"))
    # Before timm 0.9 the fields of pretrained_cfg were at the top level of config.json.
    return Transform.from_timm(config.get("pretrained_cfg") or config, source=str(source.config))


def slide_encoder_of(
    pretrained: StrPath, model_arch: str | None = None, *, named: bool = False
) -> str | None:
    """Returns the hub name of the slide encoder trained on a tile encoder; None if there is none.

    Args:
        pretrained: Weights, as for `create_model`.
        model_arch: Architecture, as for `create_model`.
        named: Whether `pretrained` is a name of `pathcore.encoders` instead.
    """
    name = os.fspath(pretrained).replace("hf-hub:", "hf_hub:")
    if named:
        return _SLIDE_ENCODERS.get(name.partition("@")[0])
    if name in (HUB_NAME, FLASH_HUB_NAME):
        return name
    if name in ("", RANDOM):
        architecture = _architecture(model_arch or DEFAULT_ARCHITECTURE)
    elif os.path.exists(name):
        architecture = _choose(find_tile_weights(name), model_arch)
    else:
        return None
    if not _is_published(architecture):
        return None
    return FLASH_HUB_NAME if architecture.model_args["embed_dim"] == 384 else HUB_NAME


def _is_published(architecture: TileArchitecture) -> bool:
    """Returns whether a model has the sizes of one of `ARCHITECTURES`, under either name."""
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    return any(
        known.timm_name == architecture.timm_name
        and all(known.model_args[name] == architecture.model_args.get(name) for name in sizes)
        for known in ARCHITECTURES.values()
    )


def resize_px(crop_px: int) -> int:
    """Returns the length of the shorter side before cropping, in the published ratio 256 / 224."""
    return round(crop_px * RESIZE_PX / CROP_PX)


def find_tile_weights(pretrained: StrPath) -> TileWeights:
    """Finds the files of a tile encoder; files of the hub are downloaded unless they are cached.

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
    """
    name = os.fspath(pretrained)
    if name.startswith(_HUB_PREFIXES):
        return _from_hub(name.split(":", 1)[1], name)
    path = Path(name)
    if path.is_dir():
        found = next((path / weights for weights in _WEIGHTS if (path / weights).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"tile encoder {path}: neither {' nor '.join(_WEIGHTS)} in this folder"
            )
        path = found
    if not path.is_file():
        raise FileNotFoundError(
            f"tile encoder {path}: no such file or folder; hub names begin with {_HUB_PREFIXES[0]}"
        )
    config = path.with_name(_CONFIG)
    return TileWeights(path, config if config.is_file() else None)


def read_config(path: Path) -> TileArchitecture:
    """Reads timm's `config.json`.

    Raises:
        ValueError: If the file is not JSON, names no architecture, or an unknown one.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name, model_args = config["architecture"], config.get("model_args", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected JSON with `architecture`, as timm writes it: {error!r}"
        ) from error
    try:
        known = _architecture(name)
    except UnknownNameError as error:
        raise ValueError(f"{path}: {error}") from error
    defaults = {k: config[k] for k in ("num_classes", "global_pool") if config.get(k) is not None}
    return TileArchitecture(known.timm_name, {**known.model_args, **defaults, **model_args})


def _from_hub(repository: str, name: str) -> TileWeights:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    repository, _, revision = repository.partition("@")

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision or None))

    try:
        config = fetch(_CONFIG)
        try:
            return TileWeights(fetch(_WEIGHTS[0]), config)
        except EntryNotFoundError:
            return TileWeights(fetch(_WEIGHTS[1]), config)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"tile encoder {name}: not in the hub's cache, and cannot be fetched "
            f"({type(error).__name__}). Accept the terms at https://huggingface.co/{repository} "
            "and set HF_TOKEN, or give the path of a folder with config.json and "
            f"{' or '.join(_WEIGHTS)}"
        ) from error


def _architecture(name: str) -> TileArchitecture:
    import timm

    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if isinstance(name, str) and timm.is_model(name):
        return TileArchitecture(name, {"num_classes": 0})
    hint = did_you_mean(name, [*ARCHITECTURES, *timm.list_models()])
    raise UnknownNameError(f"architecture {name!r}: neither ours nor timm's{hint}")


def _build(architecture: TileArchitecture, model_args: Mapping[str, Any]) -> nn.Module:
    import timm
    from timm import layers

    arguments = {**architecture.model_args, **model_args}
    if isinstance(arguments.get("mlp_layer"), str):
        arguments["mlp_layer"] = getattr(layers, arguments["mlp_layer"])
    if isinstance(arguments.get("act_layer"), str):
        arguments["act_layer"] = layers.get_act_layer(arguments["act_layer"])
    model: nn.Module = timm.create_model(architecture.timm_name, pretrained=False, **arguments)
    return model


def _choose(
    source: TileWeights, model_arch: str | None, state_dict: Mapping[str, Tensor] | None = None
) -> TileArchitecture:
    if model_arch is not None:
        return _architecture(model_arch)
    if source.config is not None:
        return read_config(source.config)
    return _architecture(
        _recognise(state_dict or read_state_dict(source.path, mmap=True), source.path)
    )


def _recognise(state_dict: Mapping[str, Tensor], path: Path) -> str:
    """Returns the name of the architecture with the embedding width of the weights."""
    weight = state_dict.get("patch_embed.proj.weight")
    widths = {arch.model_args["embed_dim"]: name for name, arch in ARCHITECTURES.items()}
    if weight is not None and weight.shape[0] in widths:
        return widths[weight.shape[0]]
    if any(name.startswith("encoder.layers.") for name in state_dict):
        raise CheckpointError(f"{path}: these are weights of a slide encoder")
    raise CheckpointError(
        f"{path}: neither {' nor '.join(ARCHITECTURES)} by their width; put the config.json of "
        "the model beside them, or name the architecture"
    )

"""Slide encoders by name: a preset describes each; networks here pool patch features.

A preset is one JSON file in `slide_presets/`. Other packages add folders of such files through the
entry point group `gigapath.slide_encoders`, whose entries return the path of a folder.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigapath.embed.slide_vectors import (
    SlideEncoderSpec,
    check_slide,
    describe_slide_encoder,
    open_slide_encoder,
    slide_vector,
)
from gigapath.finetune.mil import GatedAttention
from pathcore.encoders.encoder import weights_file
from pathcore.encoders.origin import TileOrigin
from pathcore.encoders.presets import (
    PresetError,
    check_fields,
    find_presets,
    known_encoder,
    preset_folders,
    read_preset,
)
from pathcore.files import sha256_of
from pathcore.jobs import UnitError
from pathcore.names import did_you_mean
from pathcore.weights import (
    check_loading_report,
    load_strict,
    read_state_dict,
    strip_prefix_to_fit,
)
from wsi.conform import FeatureFile
from wsi.features import EmbeddingError, check_features

ENTRY_POINTS = "gigapath.slide_encoders"
"""Group of entry points, each a function without arguments that returns a folder of presets."""

_DIGEST_CHARS = 12

Network = Callable[[Tensor, Tensor, int], Tensor]
"""Maps features `(N, D)`, coords `(N, 2)` in level-0 pixels and the side of a patch at level 0 to
the vector of the slide, `(dim,)`."""


class OriginError(UnitError):
    """Raised for features of the wrong origin for a slide encoder, or of an unknown one."""

    reason = "features of another patch encoder or scale"


class SlideEncoderError(ValueError):
    """Raised if a slide encoder cannot be opened."""


@dataclass(frozen=True)
class SlidePreset:
    """Definition of a published slide encoder.

    Attributes:
        name: Name of the preset, which is the name of its file.
        network: A key of `NETWORKS`, or `module:function` of another package; the function is
            called like those.
        patch_encoders: Presets of the patch encoders that it was trained on; empty if it takes any.
        patch_px: Side of the patches that it was trained on.
        mpp: Micrometres per pixel of those patches.
        arguments: Arguments of the network.
        names: Prefixes of tensors in the published file, and what the network calls them.
        unused: Prefixes of tensors in the published file that slide vectors do not need.
        embed_dim: Length of the vector; 0 for that of the patch features.
        patients: How the slides of a patient become one bag: `concatenated`, or `side by side`
            along x for networks that see positions.
        hub: Repository on the Hugging Face hub, or empty.
        files: Names of the weights file there, in the order in which they are tried.
        source: Page from which the weights come if they are not on the hub.
        authors_code: Whether the network is its authors' code, which runs only on request.
        packages: Packages that this code needs, by import name.
        install: How to install them.
        licence: Licence of the weights, as their page states it.
        gated: Whether the hub asks for an agreement first.
        convention: Whose reading of an ambiguous name this is.
        citation: The paper, or a page.
    """

    name: str
    network: str
    patch_encoders: tuple[str, ...] = ()
    patch_px: int = 0
    mpp: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    embed_dim: int = 0
    patients: Literal["concatenated", "side by side"] = "concatenated"
    hub: str = ""
    files: tuple[str, ...] = ()
    source: str = ""
    authors_code: bool = False
    packages: tuple[str, ...] = ()
    install: str = ""
    licence: str = "not stated"
    gated: bool = False
    convention: str = ""
    citation: str = ""

    @property
    def trained_on(self) -> str:
        """Description of the patch features that it was trained on."""
        if not self.patch_encoders:
            return "any patch encoder"
        names = " or ".join(self.patch_encoders)
        return f"{names}, {self.patch_px} px at {self.mpp:g} µm per pixel"


def list_slide_encoders(pattern: str = "") -> list[str]:
    """Returns the names of all presets that contain `pattern`, those of other packages included.

    Example:
        >>> list_slide_encoders("feather")
        ['feather-conch-v1.5', 'feather-uni', 'feather-uni2-h']
    """
    return sorted(name for name in _files() if pattern in name)


def get_slide_preset(name: str) -> SlidePreset:
    """Returns a preset by its name.

    Raises:
        SlideEncoderError: If there is none; the message suggests the nearest names.
        PresetError: If its file is wrong.
    """
    files = _files()
    if name not in files:
        raise SlideEncoderError(f"slide encoder {name!r}: not a preset{did_you_mean(name, files)}")
    return _read_slide_preset(name)


@cache  # each slide of a job asks for its preset
def _read_slide_preset(name: str) -> SlidePreset:
    files = _files()
    content, origin = read_preset(name, files), files[name]
    check_fields(content, SlidePreset, origin, {"network"})
    if content["network"] not in ("longnet", *NETWORKS) and ":" not in content["network"]:
        raise PresetError(
            f"{origin}: network {content['network']!r}, expected module:function or one of "
            f"{', '.join(NETWORKS)}"
        )
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return SlidePreset(**{**content, **lists, "name": name})


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return find_presets(_folders())


def _folders() -> Iterator[Path]:
    yield from preset_folders(Path(__file__).with_name("slide_presets"), ENTRY_POINTS)


# --- where features come from -------------------------------------------------------------------


def origin_of_file(file: FeatureFile) -> TileOrigin:
    """Returns the origin that a features file states; an encoder that is no preset is unknown."""
    stated = {"encoder": file.encoder, "patch_px": file.patch_px, "mpp": file.mpp}
    origin = TileOrigin.read({**file.attributes, **stated})
    return origin if known_encoder(origin.encoder) else replace(origin, encoder="")


def complete_origin(origin: TileOrigin, stated: TileOrigin, where: str) -> TileOrigin:
    """Fills in what the user stated and the file does not.

    Raises:
        OriginError: If the file contradicts a stated value.
    """
    for name in ("encoder", "patch_px", "mpp"):
        said, given = getattr(origin, name), getattr(stated, name)
        if said and given and said != given:
            raise OriginError(f"{where}: says {name} {said}, but {given} was stated")
    added = tuple(name for name in origin.unknown if getattr(stated, name))
    return replace(origin, stated=added, **{name: getattr(stated, name) for name in added})


def check_origin(preset: SlidePreset, origin: TileOrigin, where: str) -> None:
    """Checks that a slide encoder was trained on such features.

    Raises:
        OriginError: If it was trained on other features, or these do not state their origin; the
            message describes both.
    """
    if not preset.patch_encoders:
        return
    fits = (
        origin.encoder in ("", *preset.patch_encoders)
        and origin.patch_px in (0, preset.patch_px)
        and origin.fits_mpp(preset.mpp)
    )
    if fits and not origin.unknown:
        return
    remedy = (
        f"the file does not say its {', '.join(origin.unknown)}: state it if you know it"
        if fits
        else "compute features that it was trained on, or choose another slide encoder"
    )
    raise OriginError(
        f"{where}: features of {origin}; slide encoder {preset.name} was trained on "
        f"{preset.trained_on}; {remedy}"
    )


# --- opening ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedSlideEncoder:
    """A slide encoder by name, as a plain value that can be sent to other processes.

    Attributes:
        preset: Name of the preset; empty for weights of Prov-GigaPath's network without a name.
        weights: File or folder of its weights; empty for those of the hub.
        digest: SHA-256 of the weights; empty for networks without any, or of authors' code.
        longnet: Description of Prov-GigaPath's networks; None for others.
    """

    preset: str
    weights: str = ""
    digest: str = ""
    longnet: SlideEncoderSpec | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of its vectors, unique for its weights."""
        if self.longnet is not None:
            return f"{self.longnet.name}-{self.longnet.preset}"
        return f"{self.preset}_{self.digest[:_DIGEST_CHARS]}" if self.digest else self.preset

    def open(self, device: torch.device) -> Any:
        """Builds the network and loads its weights strictly."""
        if self.longnet is not None:
            return open_slide_encoder(self.longnet, device)
        preset = get_slide_preset(self.preset)
        build = NETWORKS.get(preset.network)
        if build is None:
            module, _, function = preset.network.partition(":")
            build = getattr(importlib.import_module(module), function)
        return build(preset, self.weights, device)

    def check(self, coords: NDArray[np.int64], size_level0: int, where: str) -> None:
        """Checks that the encoder's position grid covers the tiles.

        Raises:
            EmbeddingError: If they do not.
        """
        if self.longnet is not None:
            check_slide(coords, size_level0, self.longnet, where)

    @torch.inference_mode()
    def vector(
        self,
        network: Any,
        features: NDArray[Any],
        coords: NDArray[np.int64],
        size_level0: int,
        where: str,
    ) -> NDArray[np.float32]:
        """Embeds a slide.

        Args:
            network: Network from `open`.
            features: `(N, D)`.
            coords: `(N, 2)`: left and top in level-0 pixels.
            size_level0: Side of a patch in level-0 pixels.
            where: Name of the slide, for errors.

        Raises:
            EmbeddingError: If there are no tiles, the width is wrong, or values are not finite.
        """
        if self.longnet is not None:
            return slide_vector(network, features, coords, size_level0, self.longnet, where)
        preset = get_slide_preset(self.preset)
        check_features(features, coords, where, width=preset.arguments.get("in_dim"))
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        x = torch.from_numpy(np.asarray(features, np.float32)[order])
        found: NDArray[np.float32] = (
            network(x, torch.from_numpy(coords[order]), size_level0).float().cpu().numpy()
        )
        if found.ndim != 1 or not np.isfinite(found).all():
            raise EmbeddingError(f"{where}: expected one finite vector, found shape {found.shape}")
        return found

    def attributes(self, size_level0: int) -> dict[str, Any]:
        """Attributes that describe the encoder in the file of a vector."""
        if self.longnet is not None:
            named = {"slide_encoder": self.preset} if self.preset else {}
            return {**named, **self.longnet.attributes(size_level0)}
        return {
            "encoder": self.preset,
            "slide_encoder": self.preset,
            "weights_sha256": self.digest,
            "precision": "fp32",
        }


def describe_named_slide_encoder(
    name: str,
    *,
    trust_remote_code: bool = False,
    preset: str = "mean",
    grid_px: int | Literal["tile"] | None = None,
    precision: str = "fp32",
) -> NamedSlideEncoder:
    """Finds the weights of a slide encoder.

    Args:
        name: A preset, with `@FILE_OR_FOLDER` for weights on disk.
        trust_remote_code: Whether code of the encoder's authors may run.
        preset: Vector of Prov-GigaPath's encoders; see `slide_vectors.PRESETS`.
        grid_px: Grid of Prov-GigaPath's encoders; see `SlideEncoderSpec`.
        precision: fp32, bf16 or fp16, for Prov-GigaPath's encoders; others compute in fp32.

    Raises:
        SlideEncoderError: If the encoder is unknown, or requires its authors' code and that is not
            allowed to run or not installed.
        FileNotFoundError: If its weights are missing.
    """
    name, _, weights = name.partition("@")
    known = get_slide_preset(name)
    if known.network == "longnet":
        spec = describe_slide_encoder(
            weights or f"hf_hub:{known.hub}",
            known.arguments["in_chans"],
            model_arch=known.arguments["model_arch"],
            preset=preset,
            grid_px=grid_px,
            precision=precision,
        )
        return NamedSlideEncoder(name, weights, spec.digest, spec)
    if known.authors_code:
        where = f"https://huggingface.co/{known.hub}"
        if not trust_remote_code:
            raise SlideEncoderError(
                f"slide encoder {name}: its network is code of its authors ({where}), which runs "
                f"on this machine; read it, {known.install + ', ' if known.install else ''}accept "
                "the terms of the weights, then pass trust_remote_code=True"
            )
        missing = [p for p in known.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise SlideEncoderError(
                f"slide encoder {name}: needs {', '.join(missing)}; install by `{known.install}`"
            )
    if not known.files:
        return NamedSlideEncoder(name, weights)
    return NamedSlideEncoder(name, weights, sha256_of(weights_file(known, weights)))


# --- networks -----------------------------------------------------------------------------------


class AttentionPool(nn.Module):
    """Attention MIL without a classifier (Ilse et al. 2018, equations 7 and 9).

    Args:
        in_dim: Width of the features.
        embed_dim: Width of the embeddings on which attention is computed.
        hidden_dim: Width of the attention.
        pooled: What the attention weights: `embeddings` (FEATHER), or the `features` themselves
            (CHIEF).
    """

    def __init__(self, in_dim: int, embed_dim: int, hidden_dim: int, pooled: str) -> None:
        super().__init__()
        if pooled not in ("embeddings", "features"):
            raise ValueError(f"pooled {pooled!r}: expected embeddings or features")
        self.pooled = pooled
        self.project = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU())
        self.attention = GatedAttention(embed_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Maps a bag `(N, in_dim)` to its vector `(embed_dim,)` or `(in_dim,)`."""
        embeddings = self.project(features)
        attention = self.attention(embeddings).softmax(dim=-1)
        pooled: Tensor = attention @ (features if self.pooled == "features" else embeddings)
        return pooled[0]


def _attention(preset: SlidePreset, weights: str, device: torch.device) -> Network:
    with torch.device("meta"):
        model = AttentionPool(**preset.arguments)
    file = weights_file(preset, weights)
    load_strict(
        model,
        _renamed(read_state_dict(file), preset, list(model.state_dict())),
        what=f"slide encoder {preset.name}",
        source=file,
    )
    model = model.to(device).eval()
    return lambda features, coords, size: model(features.to(device))


def _renamed(
    state_dict: Mapping[str, Tensor], preset: SlidePreset, expected: Sequence[str]
) -> dict[str, Tensor]:
    """Renames published tensors to the names of the network, and drops unused ones."""
    back = {own: theirs for theirs, own in preset.names.items()}
    published = [
        next((theirs + n.removeprefix(own) for own, theirs in back.items() if n.startswith(own)), n)
        for n in expected
    ]
    renamed = {}
    for name, tensor in strip_prefix_to_fit(state_dict, published, ("model.", "module.")).items():
        if name.startswith(preset.unused or ("\0",)):
            continue
        theirs = next((prefix for prefix in preset.names if name.startswith(prefix)), "")
        renamed[preset.names.get(theirs, "") + name.removeprefix(theirs)] = tensor
    return renamed


def _authors_model(preset: SlidePreset, weights: str, device: torch.device) -> Any:
    """Loads a model whose code is in its repository, or in a folder with the same files."""
    from transformers import AutoModel

    source = weights or preset.hub
    try:
        # The user asked for it: `describe_named_slide_encoder` refuses otherwise.
        model, report = AutoModel.from_pretrained(
            source, trust_remote_code=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SlideEncoderError(
            f"slide encoder {preset.name}: transformers cannot load {source}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    # Repositories also store weights that their code leaves out.
    report = {**report, "unexpected_keys": ()}
    check_loading_report(report, model, what=f"slide encoder {preset.name}", source=source)
    return model.to(device).float().eval()


def _titan(preset: SlidePreset, weights: str, device: torch.device) -> Network:
    model = _authors_model(preset, weights, device)

    def embed(features: Tensor, coords: Tensor, size_level0: int) -> Tensor:
        # TITAN indexes a grid by the coordinates, so they must be int64.
        vector: Tensor = model.encode_slide_from_patch_features(
            features[None].to(device), coords[None].to(device, torch.int64), size_level0
        )
        return vector.squeeze(0)

    return embed


def _prism(preset: SlidePreset, weights: str, device: torch.device) -> Network:
    model = _authors_model(preset, weights, device)

    def embed(features: Tensor, coords: Tensor, size_level0: int) -> Tensor:
        vector: Tensor = model.slide_representations(features[None].to(device))["image_embedding"]
        return vector.squeeze(0)

    return embed


def _madeleine(preset: SlidePreset, weights: str, device: torch.device) -> Network:
    import json
    from argparse import Namespace

    file = weights_file(preset, weights)
    # The authors' loader needs a GPU and unpickles whatever the file holds.
    create_model = importlib.import_module("madeleine.models.Model").create_model
    config = json.loads(file.with_name("model_config.json").read_text(encoding="utf-8"))
    model = create_model(Namespace(**config), device=device)
    load_strict(model, read_state_dict(file), what="slide encoder madeleine", source=file)
    model = model.to(device).eval()
    return lambda features, coords, size: model.encode_he(features[None], device).squeeze(0)


def _cobra(preset: SlidePreset, weights: str, device: torch.device) -> Network:
    file = weights_file(preset, weights)
    model = importlib.import_module("cobra.model.cobra").Cobra(**preset.arguments)
    state_dict = read_state_dict(file)
    if any("momentum_enc." in name for name in state_dict):
        state_dict = {
            name.split("momentum_enc.")[-1]: tensor
            for name, tensor in state_dict.items()
            if "momentum_enc." in name and "momentum_enc.proj" not in name
        }
    load_strict(model, state_dict, what=f"slide encoder {preset.name}", source=file)
    model = model.to(device).eval()
    return lambda features, coords, size: model(features[None].to(device)).squeeze(0)


NETWORKS: dict[str, Callable[[SlidePreset, str, torch.device], Network]] = {
    "attention": _attention,
    "mean": lambda preset, weights, device: lambda features, coords, size: features.mean(dim=0),
    "max": lambda preset, weights, device: lambda features, coords, size: features.amax(dim=0),
    "titan": _titan,
    "prism": _prism,
    "madeleine": _madeleine,
    "cobra": _cobra,
}
"""Networks by their name in presets, which may also name `longnet` (Prov-GigaPath)."""

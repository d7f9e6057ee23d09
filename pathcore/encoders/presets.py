"""Presets of encoders: architecture, source of the weights, transform and licence, as data.

A preset is a JSON file in `presets/`. Other packages add folders of such files through the entry
point group `pathcore.encoders`, whose entries return the path of a folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from pathcore.encoders.transform import Transform, TransformError
from pathcore.names import did_you_mean

logger = logging.getLogger(__name__)

ENTRY_POINTS = "pathcore.encoders"
"""Group of entry points, each a function without arguments that returns a folder of presets."""

Library = Literal["timm", "transformers", "open_clip", "own", "package"]
_LIBRARIES = ("timm", "transformers", "open_clip", "own", "package")


class PresetError(ValueError):
    """Raised if a preset file is invalid."""


class UnknownEncoderError(ValueError):
    """Raised if a name is not a preset."""


@dataclass(frozen=True)
class Preset:
    """Definition of an encoder by name, as published by its authors.

    Attributes:
        name: Name of the preset, which is the name of its file.
        library: Library that builds the network, `own` for the networks of this package, or
            `package` for a package of the authors.
        architecture: Name of the network in the library; empty if the config of the weights names
            it.
        arguments: Arguments of the architecture; layers are given by name.
        hub: Repository on the Hugging Face hub, or empty.
        files: Names of the weights file in the repository, in the order in which they are tried.
        source: Page with the weights if they are not on the hub.
        transform: Preprocessing of images; None if the config of the weights defines it.
        feature: How the network's output becomes a vector: `class`, `class+mean`, `mean`, `pooler`,
            `projected`, `output`, or a name that is specific to the network.
        num_prefix_tokens: Number of class and register tokens before the patch tokens, if the
            network does not state it.
        embed_dim: Length of the vector.
        patch_px: Side in pixels of the patches that the authors read from slides, before the
            transform.
        mpp: Micrometres per pixel of those patches; empty if the authors do not state it.
        precision: Type in which features are usually computed on a GPU.
        text: Whether the model has a text tower.
        licence: Licence of the weights, as stated on their page.
        gated: Whether the hub requires an agreement.
        remote_code: Whether the network is code in the hub's repository, which runs only with
            `trust_remote_code=True`.
        package: Import name of the authors' package.
        install: Command that installs it.
        convention: Source of this definition if the name is ambiguous.
        citation: Paper or page.
        origin: File of the preset.
    """

    name: str
    library: Library
    architecture: str
    transform: Transform | None
    feature: str
    embed_dim: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    hub: str = ""
    files: tuple[str, ...] = ()
    source: str = ""
    num_prefix_tokens: int | None = None
    patch_px: int = 224
    mpp: tuple[float, ...] = ()
    precision: str = "float32"
    text: bool = False
    licence: str = "not stated"
    gated: bool = False
    remote_code: bool = False
    package: str = ""
    install: str = ""
    convention: str = ""
    citation: str = ""
    origin: str = ""


def list_encoders(pattern: str = "") -> list[str]:
    """Returns the sorted names of all presets that contain `pattern`.

    Example:
        >>> list_encoders("virchow2")
        ['virchow2', 'virchow2-cls']
    """
    return sorted(name for name in _files() if pattern in name)


def get_preset(name: str) -> Preset:
    """Returns a preset by name.

    Raises:
        UnknownEncoderError: If the name is unknown. The message suggests similar names.
        PresetError: If the preset file is invalid.

    Example:
        >>> preset = get_preset("uni2-h")
        >>> preset.embed_dim, preset.patch_px, preset.mpp
        (1536, 256, (0.5,))
    """
    files = _files()
    if name not in files:
        hint = did_you_mean(name, files)
        raise UnknownEncoderError(f"encoder {name!r}: neither a preset nor a folder{hint}")
    return _read_encoder_preset(name)


def known_encoder(name: str) -> str:
    """Returns the preset for an encoder name of another tool, or an empty string."""
    aliases = {"uni_v1": "uni", "uni_v2": "uni2-h", "uni2": "uni2-h", "gigapath": "prov-gigapath",
               "conch_v1": "conch", "conch_v15": "conch-v1.5", "hoptimus0": "h-optimus-0",
               "hoptimus1": "h-optimus-1", "phikon_v2": "phikon-v2"}  # fmt: skip
    plain = aliases.get(name, name)
    try:
        return get_preset(plain).name
    except UnknownEncoderError:
        return ""


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return find_presets(_folders())


def _folders() -> Iterator[Path]:
    yield from preset_folders(Path(__file__).with_name("presets"), ENTRY_POINTS)


def find_presets(folders: Iterable[Path]) -> dict[str, Path]:
    """Returns the JSON files of folders by their stems, the names of the presets.

    Raises:
        PresetError: If two files have one name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            if file.stem in found:
                raise PresetError(
                    f"encoder {file.stem}: in {found[file.stem]} and in {file}; rename one"
                )
            found[file.stem] = file
    return found


def preset_folders(own: Path, group: str) -> Iterator[Path]:
    """Yields a folder of presets of this distribution, then those of a group of entry points.

    Raises:
        PresetError: If an entry point names no folder.
    """
    yield own
    for entry in importlib.metadata.entry_points(group=group):
        try:
            folder = Path(entry.load()())
        except (ImportError, AttributeError) as error:
            # A broken third-party package must not disable all other encoders.
            logger.warning("presets of %s (%s) skipped: %s", entry.name, entry.value, error)
            continue
        if not folder.is_dir():
            raise PresetError(f"entry point {entry.name} ({entry.value}): no folder {folder}")
        yield folder


@cache
def _read_encoder_preset(name: str) -> Preset:
    content, origin = read_preset(name, _files()), _files()[name]
    check_fields(
        content, Preset, origin, {"library", "architecture", "transform", "feature", "embed_dim"}
    )
    if content["library"] not in _LIBRARIES:
        raise PresetError(
            f"{origin}: library {content['library']!r}, expected one of {', '.join(_LIBRARIES)}"
        )
    try:
        described = content["transform"]
        transform = None if described == "config" else Transform.from_dict(described)
    except TransformError as error:
        raise PresetError(f"{origin}: {error}") from error
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    return Preset(**{**values, "name": name, "transform": transform, "origin": str(origin)})


def read_preset(name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Reads the file of a preset, merged over that of the preset it extends.

    Raises:
        PresetError: If it is no JSON object, or extends no other preset.
    """
    file = files[name]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PresetError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PresetError(f"{file}: expected a JSON object, found {type(content).__name__}")
    base = content.pop("extends", None)
    if base is None:
        return _complete(content)
    if base not in files or base == name:
        raise PresetError(f"{file}: extends {base!r}, which is no other preset")
    return {**read_preset(base, files), **_complete(content)}


def check_fields(
    content: Mapping[str, Any], preset: type[Any], origin: Path, required: Set[str]
) -> None:
    """Checks that a preset's file has the fields of its dataclass.

    Raises:
        PresetError: If a field is unknown, or a required one is missing.
    """
    known = {entry.name for entry in fields(preset)} - {"name", "origin"}
    if unknown := set(content) - known:
        raise PresetError(f"{origin}: {', '.join(sorted(unknown))} not known")
    if missing := required - set(content):
        raise PresetError(f"{origin}: {', '.join(sorted(missing))} missing")


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    """Adds the default of an optional field of the transform: no crop."""
    if isinstance(content.get("transform"), dict):
        content = {**content, "transform": {"crop_px": None, **content["transform"]}}
    return content

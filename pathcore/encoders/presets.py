"""Encoders that are known by name: what belongs to the weights, as data.

A preset is one JSON file in `presets/`. Other packages add folders of such files through the entry
point group `pathcore.encoders`, whose entries return the path of a folder.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from pathcore.encoders.transform import Transform, TransformError

logger = logging.getLogger(__name__)

ENTRY_POINTS = "pathcore.encoders"
"""Group of entry points, each a function without arguments that returns a folder of presets."""

Library = Literal["timm", "transformers", "open_clip", "own", "package"]
_LIBRARIES = ("timm", "transformers", "open_clip", "own", "package")


class PresetError(ValueError):
    """A preset file that does not say what a preset must say."""


class UnknownEncoderError(ValueError):
    """A name that is no preset."""


@dataclass(frozen=True)
class Preset:
    """What the field means by the name of an encoder.

    Attributes:
        name: Name of the preset, which is the name of its file.
        library: Where the network is built: a library, `own` for the networks of this package, or
            `package` for code that its authors publish.
        architecture: The library's name of the network. Empty if the configuration beside the
            weights says it.
        arguments: Arguments of the architecture; layers by their name.
        hub: Repository on the Hugging Face hub, or empty.
        files: Names of the weights file there, in the order in which they are tried.
        source: Page from which the weights come if they are not on the hub.
        transform: What is done to an image. None if the configuration beside the weights says it.
        feature: How the network's output becomes a vector: `class`, `class+mean`, `mean`, `pooler`,
            `projected`, `output`, or a name that the network knows.
        num_prefix_tokens: Class and register tokens before the patch tokens, where the network
            does not tell.
        embed_dim: Length of the vector.
        patch_px: Side of the patches that the authors read from slides, before the transform.
        mpp: Micrometres per pixel of those patches. Empty where the authors name none.
        precision: The type in which the field computes the features on a GPU.
        text: Whether the model has a text tower.
        licence: Licence of the weights, as their page states it.
        gated: Whether the hub asks for an agreement first.
        remote_code: Whether the network is code in the hub's repository, which runs only with
            `trust_remote_code=True`.
        package: Import name of the authors' package.
        install: How to install it.
        convention: Whose reading of an ambiguous name this is.
        citation: The paper, or a page.
        origin: The file of the preset.
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
    """Returns the names of all presets that contain `pattern`, those of other packages included.

    Example:
        >>> list_encoders("virchow2")
        ['virchow2', 'virchow2-cls']
    """
    return sorted(name for name in _files() if pattern in name)


def get_preset(name: str) -> Preset:
    """Returns a preset by its name.

    Raises:
        UnknownEncoderError: If there is none; the message suggests the nearest names.
        PresetError: If its file is wrong.

    Example:
        >>> preset = get_preset("uni2-h")
        >>> preset.embed_dim, preset.patch_px, preset.mpp
        (1536, 256, (0.5,))
    """
    files = _files()
    if name not in files:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), files, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownEncoderError(f"encoder {name!r}: neither a preset nor a folder{hint}")
    return _read(name)


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """Returns the file of each preset."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for file in sorted(folder.glob("*.json")):
            if file.stem in found:
                raise PresetError(
                    f"encoder {file.stem}: in {found[file.stem]} and in {file}; rename one"
                )
            found[file.stem] = file
    return found


def _folders() -> Iterator[Path]:
    yield Path(__file__).with_name("presets")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            folder = Path(entry.load()())
        except (ImportError, AttributeError) as error:
            # A broken package of somebody else must not take all other encoders away.
            logger.warning("presets of %s (%s) skipped: %s", entry.name, entry.value, error)
            continue
        if not folder.is_dir():
            raise PresetError(f"entry point {entry.name} ({entry.value}): no folder {folder}")
        yield folder


@cache
def _read(name: str) -> Preset:
    content, origin = _content(name)
    known = {entry.name for entry in fields(Preset)} - {"name", "origin"}
    if unknown := set(content) - known:
        raise PresetError(f"{origin}: {', '.join(sorted(unknown))} not known")
    required = {"library", "architecture", "transform", "feature", "embed_dim"}
    if missing := required - set(content):
        raise PresetError(f"{origin}: {', '.join(sorted(missing))} missing")
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


def _content(name: str) -> tuple[dict[str, Any], Path]:
    """Reads a preset's file over that of the preset that it extends."""
    file = _files()[name]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PresetError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PresetError(f"{file}: expected a JSON object, found {type(content).__name__}")
    base = content.pop("extends", None)
    if base is None:
        return _complete(content), file
    if base not in _files() or base == name:
        raise PresetError(f"{file}: extends {base!r}, which is no other preset")
    return {**_content(base)[0], **_complete(content)}, file


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    """Fills in what a transform may leave open: no crop."""
    if isinstance(content.get("transform"), dict):
        content = {**content, "transform": {"crop_px": None, **content["transform"]}}
    return content

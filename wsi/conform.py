"""Reads, checks and converts feature files of other tools.

Reads files of this package, TRIDENT, CLAM, STAMP and slide2vec. The checks look for defects that
were reported for these tools: swapped axes, coordinates of another level or normalised to 0..1000,
tiles of another scale, overflow of float16, duplicates, features of another encoder.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pathcore.encoders.presets import get_preset, known_encoder, list_encoders
from pathcore.files import StrPath
from wsi.store import write_features

SUFFIXES = (".h5", ".hdf5", ".npz")
"""Suffixes of the files that `read_feature_file` reads."""

_DAMAGED = (
    *(OSError, ValueError, KeyError, RuntimeError, TypeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What h5py and NumPy raise for damaged files."""

_MAX_COORDINATE = 2.0**53
"""Largest float up to which all whole numbers can be stored."""

_FLOAT16_MAX = 65504.0
_SQUEEZED_PX = 1000
"""Length to which GigaPath wrappers that normalise coordinates map the longer side of a slide."""

_RELATIVE_TOLERANCE = 0.02
"""Tolerance of scales: scanners state, for instance, 0.2527 um/px where tools assume 0.25."""

_ALIKE = 1e-6
"""Spread of features, relative to their magnitude, below which all tiles count as equal."""


class FeatureFileError(ValueError):
    """Raised if a file is damaged, has an unknown layout, or cannot be converted."""


@dataclass(frozen=True)
class FeatureFile:
    """Tile features of a slide as a tool stored them.

    Attributes:
        path: The file.
        layout: `xtuner-add`, `TRIDENT`, `CLAM`, `STAMP` or `slide2vec`.
        encoder: Name of the encoder; empty if the file does not name it.
        features: `(N, dim)`.
        coords: float64 `(M, 2)`, left and top in `unit`; None if the file has none. M and N differ
            in damaged files.
        unit: `px` for level-0 pixels, or `um`.
        patch_level0_px: Side of a tile in level-0 pixels; None if unknown.
        patch_px: Side of the image that the encoder was given; None if unknown.
        overlap_px: Overlap of neighbouring tiles in pixels of that image.
        mpp: Micrometres per pixel of that image.
        mpp_level0: Micrometres per pixel at level 0.
        slide_px: `(width, height)` of the slide at level 0.
        attributes: All attributes of the file by name.
    """

    path: Path
    layout: str
    encoder: str
    features: NDArray[Any]
    coords: NDArray[np.float64] | None
    unit: str = "px"
    patch_level0_px: float | None = None
    patch_px: float | None = None
    overlap_px: float = 0.0
    mpp: float | None = None
    mpp_level0: float | None = None
    slide_px: tuple[int, int] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float | None:
        """Level-0 pixels per pixel of the encoder's image; None if unknown."""
        if not self.patch_level0_px or not self.patch_px:
            return None
        return self.patch_level0_px / self.patch_px

    def describe(self) -> dict[str, Any]:
        """Returns a summary of the file as JSON values."""
        return {
            "file": str(self.path),
            "layout": self.layout,
            "encoder": self.encoder or None,
            "encoders_of_this_width": _encoders_of_width(self.features.shape[-1]),
            "num_tiles": len(self.features),
            "dim": int(self.features.shape[-1]),
            "dtype": str(self.features.dtype),
            "coordinates": None if self.coords is None else f"left and top, {self.unit}",
            "patch_px": self.patch_px,
            "patch_level0_px": self.patch_level0_px,
            "mpp": self.mpp,
            "slide_px": list(self.slide_px) if self.slide_px else None,
        }


@dataclass(frozen=True)
class Finding:
    """A defect of a file.

    Attributes:
        defect: Short name, stable across versions.
        message: What was found, what was expected and what to do.
        convertible: Whether `converted` corrects it.
    """

    defect: str
    message: str
    convertible: bool = False


def read_feature_file(path: StrPath) -> FeatureFile:
    """Reads a feature file of any known layout, without checking its content.

    Raises:
        FileNotFoundError: If the file does not exist.
        FeatureFileError: If it is damaged, or has an unknown layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features {path}: no such file")
    try:
        features, coords, attributes = (_read_npz if path.suffix == ".npz" else _read_hdf5)(path)
    except FeatureFileError:
        raise
    except _DAMAGED as error:
        raise FeatureFileError(f"features {path}: cannot be read: {error}") from error
    if features.ndim == 3 and len(features) == 1:  # a batch of one slide
        features = features[0]
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise FeatureFileError(
            f"features {path}: {features.shape} of {features.dtype}, expected numbers (N, dim)"
        )
    if coords is not None:
        coords = coords.reshape(-1, coords.shape[-1]) if coords.ndim == 3 else coords
        if coords.ndim != 2 or coords.shape[1] < 2 or coords.dtype.kind not in "fiu":
            raise FeatureFileError(f"features {path}: coords {coords.shape}, expected (N, 2)")
        coords = coords[:, :2].astype(np.float64)
        usable = (np.abs(coords) < _MAX_COORDINATE).all(axis=1)  # false for NaN
        if not usable.all():
            first = int((~usable).argmax())
            raise FeatureFileError(
                f"features {path}: coords of {int((~usable).sum())} tiles are no position in a "
                f"slide, the first {coords[first].tolist()}; tile the slide again"
            )
    if path.suffix == ".npz":
        return _slide2vec(path, features, coords, attributes)
    if "stamp_version" in attributes:
        return _stamp(path, features, coords, attributes)
    return _trident_or_clam(path, features, coords, attributes)


def check(
    file: FeatureFile,
    *,
    encoder: str = "",
    slide_px: tuple[int, int] | None = None,
    mpp_level0: float | None = None,
) -> list[Finding]:
    """Looks for known defects.

    Args:
        file: The file.
        encoder: Preset that the features should come from; by default the one that the file names.
        slide_px: Width and height of the slide at level 0; must be those that the file states.
        mpp_level0: Micrometres per pixel of the slide, used if the file does not state it.

    Returns:
        The defects found; an empty list does not prove that the file is correct.

    Raises:
        UnknownEncoderError: If `encoder` is not a preset.

    Example:
        >>> file = FeatureFile(
        ...     Path("slide.h5"), "CLAM", "uni", np.eye(4, 1024), np.zeros((4, 2)), patch_px=256
        ... )
        >>> [finding.defect for finding in check(file)]
        ['duplicate tiles']
    """
    findings = [*_check_features(file, encoder)]
    if slide_px is not None and file.slide_px not in (None, slide_px):
        findings.append(
            Finding(
                "another slide",
                f"of a slide of {file.slide_px} px, but the slide of this name has {slide_px} px; "
                "tile and embed it again",
            )
        )
    file = replace(
        file,
        slide_px=file.slide_px or slide_px,
        mpp_level0=file.mpp_level0 or mpp_level0,
    )
    if file.coords is None:
        findings.append(
            Finding("no coordinates", "no `coords`; slide encoders and heat maps need them")
        )
        return findings
    if len(file.coords) != len(file.features):
        findings.append(
            Finding(
                "different lengths",
                f"{len(file.features)} features, {len(file.coords)} coordinates; they cannot be "
                "matched, compute the features again",
            )
        )
    if not np.isfinite(file.coords).all():
        findings.append(Finding("coordinates are not finite", "coords hold NaN or infinity"))
        return findings
    return findings + _check_coordinates(file)


def converted(
    file: FeatureFile,
    findings: Sequence[Finding],
    out: StrPath,
    *,
    mpp_level0: float | None = None,
) -> int:
    """Writes a file in the layout of this package and TRIDENT, with convertible defects corrected.

    Args:
        file: The file.
        findings: Findings of `check` for this file.
        out: The file to write.
        mpp_level0: Micrometres per pixel of the slide; required if coordinates are micrometres.

    Returns:
        Number of tiles written.

    Raises:
        FeatureFileError: If a defect cannot be corrected, or a required length is unknown.
    """
    fatal = [finding for finding in findings if not finding.convertible]
    if fatal:
        raise FeatureFileError(
            f"features {file.path}: cannot be converted: "
            + "; ".join(f"{finding.defect}: {finding.message}" for finding in fatal)
        )
    assert file.coords is not None, "its absence is a finding"
    defects = {finding.defect for finding in findings}
    coords, features = file.coords, file.features
    patch_level0, mpp_level0 = file.patch_level0_px, file.mpp_level0 or mpp_level0
    if file.unit == "um":
        if mpp_level0 is None:
            raise FeatureFileError(
                f"features {file.path}: its coordinates are micrometres; pass mpp_level0=, the "
                "micrometres per pixel of the slide"
            )
        coords = coords / mpp_level0
        patch_level0 = file.patch_px * file.mpp / mpp_level0 if file.patch_px and file.mpp else None
    if "swapped axes" in defects:
        coords = coords[:, ::-1]
    if "coordinates of another level" in defects and file.scale is not None:
        coords = coords * file.scale
    if "duplicate tiles" in defects:
        _, first = np.unique(coords, axis=0, return_index=True)
        coords, features = coords[np.sort(first)], features[np.sort(first)]
    if patch_level0 is None or file.patch_px is None:
        raise FeatureFileError(
            f"features {file.path}: no tile size found; the coordinates cannot be used without it; "
            "expected an attribute such as patch_size_level0"
        )
    attributes: dict[str, Any] = {
        "patch_size": round(file.patch_px),
        "patch_size_level0": round(patch_level0),
        "overlap": round(file.overlap_px),
        "name": file.path.stem,
        "converted_from": file.layout,
    }
    for name, value in (("mpp", file.mpp), ("mpp_level0", mpp_level0)):
        if value is not None:
            attributes[name] = float(value)
    if file.slide_px is not None:
        attributes |= {"level0_width": file.slide_px[0], "level0_height": file.slide_px[1]}
    write_features(
        out, features, np.round(coords).astype(np.int64), encoder=file.encoder or "unknown",
        attributes=attributes,
    )  # fmt: skip
    return len(features)


# --- layouts ------------------------------------------------------------------------------------


def _read_hdf5(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None, dict[str, Any]]:
    """Returns features, coordinates and attributes of an HDF5 file."""
    with h5py.File(path, "r") as file:
        datasets = {name: node for name, node in file.items() if isinstance(node, h5py.Dataset)}
        attributes = dict(file.attrs)
        for name in ("coords", "features"):
            if name in datasets:
                attributes |= dict(datasets[name].attrs)
        found = next((name for name in ("features", "feats") if name in datasets), None)
        if found is None:
            raise FeatureFileError(
                f"features {path}: neither `features` nor `feats` in it, only {sorted(file)}"
            )
        features = np.asarray(datasets[found])
        coords = np.asarray(datasets["coords"]) if "coords" in datasets else None
    return features, coords, {name: _plain_value(value) for name, value in attributes.items()}


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None, dict[str, Any]]:
    """Reads an archive of slide2vec, with attributes from `NAME.meta.json` beside it."""
    with np.load(path, allow_pickle=False) as archive:
        if "features" not in archive:
            raise FeatureFileError(f"features {path}: no `features` in it, only {archive.files}")
        features, coords = archive["features"], archive.get("coords")
    meta = path.with_name(f"{path.stem}.meta.json")
    attributes = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
    if not isinstance(attributes, dict):
        raise FeatureFileError(f"features {path}: {meta.name}: expected an object")
    return features, coords, attributes


def _stamp(
    path: Path, features: NDArray[Any], coords: Any, attributes: dict[str, Any]
) -> FeatureFile:
    """Interprets a file of STAMP: coordinates and tile sizes are in micrometres."""
    um, pixels = (
        _number_attribute(attributes, "tile_size_um"),
        _number_attribute(attributes, "tile_size_px"),
    )
    # The extractor's name carries a hash of its weights: `uni-1a2b3c4d`.
    extractor = re.sub(r"-[0-9a-f]{8,}$", "", str(attributes.get("extractor", "")))
    return FeatureFile(
        path, "STAMP", extractor, features, coords,
        unit="um" if attributes.get("unit", "um") == "um" else "px",
        patch_px=pixels,
        mpp=um / pixels if um and pixels else None,
        attributes=attributes,
    )  # fmt: skip


def _trident_or_clam(
    path: Path, features: NDArray[Any], coords: Any, attributes: dict[str, Any]
) -> FeatureFile:
    number = lambda name: _number_attribute(attributes, name)  # noqa: E731
    patch, level0 = number("patch_size"), number("patch_size_level0")
    pixels = number("patch_px") or patch
    layout = "CLAM"
    if level0 is not None or "target_magnification" in attributes:
        layout = "xtuner-add" if "mpp_level0" in attributes else "TRIDENT"
    magnified, target = number("level0_magnification"), number("target_magnification")
    if level0 is None and patch and magnified and target:
        level0 = patch * magnified / target
    elif level0 is None and patch:
        shrunk = number("downsample") if number("patch_level") else 1.0
        level0 = patch * (shrunk or 1.0) * (number("custom_downsample") or 1.0)
    width, height = number("level0_width"), number("level0_height")
    return FeatureFile(
        path,
        layout,
        str(attributes.get("encoder", "")) or _encoder_of_folder(path),
        features,
        coords,
        patch_level0_px=level0,
        patch_px=pixels,
        overlap_px=number("overlap") or 0.0,
        mpp=number("mpp"),
        mpp_level0=number("mpp_level0"),
        slide_px=(int(width), int(height)) if width and height else None,
        attributes=attributes,
    )


def _slide2vec(
    path: Path, features: NDArray[Any], coords: Any, attributes: dict[str, Any]
) -> FeatureFile:
    return FeatureFile(
        path,
        "slide2vec",
        str(attributes.get("encoder", attributes.get("encoder_name", ""))),
        features,
        coords,
        patch_px=_number_attribute(attributes, "tile_size_px"),
        mpp=_number_attribute(attributes, "spacing_um"),
        attributes=attributes,
    )


def _encoder_of_folder(path: Path) -> str:
    """Returns the encoder from the folder: TRIDENT's `features_ENCODER` or `features/ENCODER`."""
    if path.parent.name.startswith("features_"):
        return path.parent.name.removeprefix("features_")
    return path.parent.name if path.parent.parent.name == "features" else ""


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    array = np.asarray(value)
    if array.dtype.kind in "fiub" and array.size:
        return array.reshape(-1)[0].item()  # CLAM stores one factor for each axis
    return value


def _number_attribute(attributes: Mapping[str, Any], name: str) -> float | None:
    value = attributes.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value) if value > 0 else None


# --- checks -------------------------------------------------------------------------------------


def _check_features(file: FeatureFile, encoder: str) -> list[Finding]:
    findings = []
    width = file.features.shape[1]
    expected = encoder or known_encoder(file.encoder)
    if expected and (dim := get_preset(expected).embed_dim) != width:
        findings.append(
            Finding(
                "wrong width",
                f"{width} features where {expected} gives {dim}; {_candidates(width)}",
            )
        )
    if not len(file.features):
        findings.append(Finding("empty", "no tiles in it"))
        return findings
    values = file.features.astype(np.float64)
    finite = np.isfinite(values)
    if np.isnan(values).any():
        rows = int((~finite).any(axis=1).sum())
        findings.append(
            Finding("NaN", f"{rows} of {len(values)} tiles hold NaN; compute them again")
        )
    elif not finite.all() or (
        file.features.dtype == np.float16 and float(np.abs(values).max()) >= _FLOAT16_MAX
    ):
        rows = int((~finite | (np.abs(values) >= _FLOAT16_MAX)).any(axis=1).sum())
        findings.append(
            Finding(
                "float16 overflow",
                f"{rows} of {len(values)} tiles exceed the largest float16 ({_FLOAT16_MAX:g}); "
                "compute them again in bf16 or fp32",
            )
        )
    elif len(values) > 1:
        spread = float(values.std(axis=0).max())
        if spread <= _ALIKE * max(float(np.abs(values).max()), 1e-12):
            findings.append(
                Finding(
                    "all tiles alike",
                    "all tiles have the same features; the encoder was given blank images, or its "
                    "weights were never loaded",
                )
            )
    return findings


def _check_coordinates(file: FeatureFile) -> list[Finding]:
    coords = file.coords
    assert coords is not None
    squeezed = _squeezed(file) if file.unit == "px" else None
    if squeezed:
        return [squeezed]
    findings = []
    if (coords < 0).any():
        findings.append(
            Finding("negative coordinates", f"{int((coords < 0).any(axis=1).sum())} tiles begin "
                    "left of or above the slide")
        )  # fmt: skip
    duplicates = len(coords) - len(np.unique(coords, axis=0))
    if duplicates:
        findings.append(
            Finding(
                "duplicate tiles",
                f"{duplicates} of {len(coords)} tiles repeat the position of another; they count "
                "twice in every mean. Converting keeps the first",
                convertible=True,
            )
        )
    if file.unit != "px":
        return findings
    if (coords != np.round(coords)).any():
        findings.append(
            Finding(
                "coordinates are not pixels",
                "fractions in pixel coordinates; they may be micrometres or normalised",
            )
        )
        return findings
    findings += _check_scale(file)
    level = _other_level(file)
    if level:
        return [*findings, level]
    return findings + _check_position(file)


def _squeezed(file: FeatureFile) -> Finding | None:
    """Finds coordinates that were normalised to 0..1000, so that most tiles overlap."""
    coords, patch = file.coords, file.patch_level0_px or file.patch_px or 256.0
    assert coords is not None
    top = float(coords.max(initial=0.0))
    if len(coords) < 10 or top > _SQUEEZED_PX or top < 0.9 * _SQUEEZED_PX:
        return None
    extent = np.ptp(coords, axis=0) + patch
    # Only if there are more than twice as many tiles as fit side by side into their bounding box;
    # a small slide may really be 1000 px wide.
    if len(coords) * (patch - file.overlap_px) ** 2 <= 2 * float(np.prod(extent)):
        return None
    return Finding(
        "normalised coordinates",
        f"{len(coords)} tiles of {patch:g} px lie within {top:g} px: the coordinates were mapped "
        f"to 0..{_SQUEEZED_PX}, and where the tiles lay is lost; compute them again",
    )


def _check_scale(file: FeatureFile) -> list[Finding]:
    """Compares the size of a tile with the resolutions and magnifications that the file states."""
    scale = file.scale
    if scale is None:
        return []
    attributes = file.attributes
    magnified = _number_attribute(attributes, "level0_magnification")
    target = _number_attribute(attributes, "target_magnification")
    stated = {}
    if magnified and target:
        stated["magnifications"] = magnified / target
    if file.mpp and file.mpp_level0:
        stated["resolutions"] = file.mpp / file.mpp_level0
    return [
        Finding(
            "tiles of another scale",
            f"a tile of {file.patch_px:g} px spans {file.patch_level0_px:g} px of level 0, a "
            f"factor of {scale:g}, but the {name} in the file say {other:g}; tile it again",
        )
        for name, other in stated.items()
        if abs(scale / other - 1) > _RELATIVE_TOLERANCE + 1 / file.patch_level0_px  # type: ignore[operator]
    ][:1]


def _other_level(file: FeatureFile) -> Finding | None:
    """Finds coordinates that count pixels of the level that was read instead of level 0."""
    scale, coords = file.scale, file.coords
    assert coords is not None
    if scale is None or abs(scale - 1) < _RELATIVE_TOLERANCE or file.patch_px is None:
        return None
    step = _grid_step(coords)
    stride = file.patch_px - file.overlap_px
    if step is None or abs(step - stride) > 1:
        return None
    return Finding(
        "coordinates of another level",
        f"tiles span {file.patch_level0_px:g} px of level 0 but lie {step:g} px apart: the "
        f"coordinates count pixels of the level that was read. Converting multiplies by {scale:g}",
        convertible=True,
    )


def _check_position(file: FeatureFile) -> list[Finding]:
    coords, patch = file.coords, file.patch_level0_px or file.patch_px
    assert coords is not None
    findings = []
    if file.slide_px is not None and len(coords):
        size = np.array(file.slide_px, np.float64)
        outside = (coords >= size).any(axis=1)
        swapped = (coords[:, ::-1] >= size).any(axis=1)
        if outside.any() and not swapped.any():
            findings.append(
                Finding(
                    "swapped axes",
                    f"{int(outside.sum())} tiles begin outside of the slide of "
                    f"{file.slide_px[0]} x {file.slide_px[1]} px, none does with x and y "
                    "exchanged. Converting exchanges them",
                    convertible=True,
                )
            )
        elif outside.any():
            findings.append(
                Finding(
                    "outside of the slide",
                    f"{int(outside.sum())} of {len(coords)} tiles begin outside of the slide of "
                    f"{file.slide_px[0]} x {file.slide_px[1]} px; they belong to another slide or "
                    "another level",
                )
            )
    step = _grid_step(coords)
    scale = file.scale or 1.0
    if step and patch and step < (patch - file.overlap_px * scale) * 0.9 and not findings:
        findings.append(
            Finding(
                "tiles overlap",
                f"tiles of {patch:g} px lie {step:g} px apart, though the file states an overlap "
                f"of {file.overlap_px:g} px; patch size or coordinates are of another level",
            )
        )
    return findings


def _grid_step(coords: NDArray[np.float64]) -> float | None:
    """Returns the usual distance of neighbours in a row or column; None if there are too few.

    This is the median of the smaller half of the distances, which gaps in the tissue do not affect.
    """
    steps = []
    for axis in (0, 1):
        order = np.lexsort((coords[:, axis], coords[:, 1 - axis]))
        line = coords[order]
        together = np.diff(line[:, 1 - axis]) == 0
        distances = np.diff(line[:, axis])[together]
        steps.append(distances[distances > 0])
    found = np.concatenate(steps)
    return float(np.median(np.sort(found)[: max(1, len(found) // 2)])) if len(found) >= 4 else None


def _encoders_of_width(width: int) -> list[str]:
    return [name for name in list_encoders() if get_preset(name).embed_dim == width]


def _candidates(width: int) -> str:
    names = _encoders_of_width(width)
    return (
        f"of this width are {', '.join(names[:8])}" if names else "no known encoder has this width"
    )

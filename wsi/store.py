"""Reads and writes coordinates and features in HDF5, compatible with TRIDENT and CLAM.

Both tools store a dataset `coords` `(N, 2)` of left and top in level-0 pixels, with attributes.
TRIDENT's `patch_size` counts pixels after scaling, CLAM's counts pixels of `patch_level` before
scaling. Files written here have TRIDENT's attributes, and also CLAM's if both agree.
`style="clam"` always writes attributes that CLAM can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathcore.encoders.origin import feature_attributes
from pathcore.files import StrPath, atomic_file
from pathcore.jobs import UnitError
from wsi.reader import Slide
from wsi.tiling import Tiling

CoordsStyle = Literal["trident", "clam"]

_MAGNIFICATIONS = ("level0", "target")


@dataclass(frozen=True)
class Coordinates:
    """Content of a coordinates file.

    Attributes:
        name: Id of the slide.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of a patch in level-0 pixels.
        patch_px: Side of the image of a patch in pixels.
        mpp: Micrometres per pixel of that image; None if the file does not state it.
        slide_px: Width and height of the slide at level 0; None if the file does not state them.
    """

    name: str
    coords: NDArray[np.int64]
    size_level0: int
    patch_px: int
    mpp: float | None = None
    slide_px: tuple[int, int] | None = None


class OtherSlideError(UnitError):
    """Raised if coordinates belong to another slide than the one that is opened."""

    reason = "coordinates of another slide"


def write_coordinates(
    path: StrPath,
    slide: Slide,
    tiling: Tiling,
    *,
    name: str = "",
    style: CoordsStyle = "trident",
) -> None:
    """Writes the coordinates of the patches of a slide atomically.

    Args:
        path: The file.
        slide: The slide.
        tiling: The patches.
        name: Id of the slide; by default its file name without suffix.
        style: `trident`; or `clam` for CLAM, which does not know TRIDENT's attributes for patches
            that are scaled.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from wsi.tiling import PatchSpec, tile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (700, 520)).save(folder / "slide.png")
        >>> with Slide(folder / "slide.png", mpp=0.25) as slide:
        ...     tiling = tile(slide, PatchSpec(patch_px=128, mpp=0.5))
        ...     write_coordinates(folder / "slide.h5", slide, tiling)
        >>> found = read_coordinates(folder / "slide.h5")
        >>> found.coords.shape, found.size_level0, found.patch_px, found.mpp
        ((4, 2), 256, 128, 0.5)
    """
    attributes = _trident_attributes(slide, tiling, name or slide.path.stem)
    if style == "clam":
        attributes |= {"patch_size": tiling.size_level0, **_clam_attributes(slide, 0)}
        attributes["patch_px"] = tiling.spec.patch_px
    else:
        scale = tiling.size_level0 / tiling.spec.patch_px
        if scale in slide.level_downsamples:
            level = list(slide.level_downsamples).index(scale)
            attributes |= _clam_attributes(slide, level)
    _write(path, {"coords": (tiling.coords, attributes)}, {})


def read_coordinates(path: StrPath) -> Coordinates:
    """Reads a coordinates file of this package, TRIDENT or CLAM.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not HDF5, has no valid `coords`, or its attributes do not state the
            size of a patch.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"coordinates {path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            if "coords" not in file:
                raise ValueError(f"no dataset 'coords' in it, only {sorted(file)}")
            dataset = file["coords"]
            coords, attributes = np.asarray(dataset[:]), dict(dataset.attrs)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # TypeError: coords is a group
        kind = "" if h5py.is_hdf5(path) else "not an HDF5 file: "
        raise ValueError(f"coordinates {path}: {kind}{error}") from error
    if coords.size == 0:  # TRIDENT writes shape (0,) if there are no patches
        coords = coords.reshape(0, 2)
    if coords.ndim != 2 or coords.shape[1] != 2 or not _are_whole(coords):
        raise ValueError(f"coordinates {path}: expected whole numbers (N, 2), found {coords.shape}")
    size_level0, patch_px = _sizes(path, attributes)
    name = attributes.get("name", path.stem.removesuffix("_patches"))
    name = name.decode() if isinstance(name, bytes) else str(name)
    try:
        mpp = _number(attributes["mpp"]) if "mpp" in attributes else None
        slide_px = slide_px_of(attributes)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"coordinates {path}: mpp, level0_width or level0_height: {error}"
        ) from error
    return Coordinates(name, coords.astype(np.int64), size_level0, patch_px, mpp, slide_px)


def read_coordinates_of(slide: Slide, path: StrPath) -> Coordinates:
    """Reads the coordinates file of a slide, see `read_coordinates`.

    Raises:
        OtherSlideError: If the file states another size of the slide, as it does if the tissue was
            scanned again, or patches lie outside of it.
    """
    found = read_coordinates(path)
    check_slide_px(slide, found.slide_px, f"coordinates {path}")
    size, coords = found.size_level0, found.coords
    outside = ((coords >= slide.dimensions) | (coords + size <= 0)).any(axis=1)
    if outside.any():
        x, y = coords[int(outside.argmax())].tolist()
        raise OtherSlideError(
            f"coordinates {path}: {int(outside.sum())} of {len(coords)} patches lie outside the "
            f"slide of {slide.dimensions[0]} x {slide.dimensions[1]} px, the first at ({x}, {y}): "
            "expected level-0 pixels, x before y"
        )
    return found


def check_slide_px(slide: Slide, stated: tuple[int, int] | None, where: str) -> None:
    """Checks that a slide has the size that a coordinates file states.

    Args:
        slide: The slide.
        stated: Width and height, see `Coordinates`.
        where: What states them, for the error message.

    Raises:
        OtherSlideError: If they differ.
    """
    if stated is not None and stated != slide.dimensions:
        raise OtherSlideError(
            f"{where}: of a slide of {stated[0]} x {stated[1]} px, but {slide.path} has "
            f"{slide.dimensions[0]} x {slide.dimensions[1]} px; tile this one again"
        )


def slide_px_of(attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns width and height of the slide at level 0 from the attributes of `coords`."""
    if not {"level0_width", "level0_height"} <= attributes.keys():
        return None
    return int(_number(attributes["level0_width"])), int(_number(attributes["level0_height"]))


def write_features(
    path: StrPath,
    features: NDArray[Any],
    coords: NDArray[np.int64],
    *,
    encoder: str,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Writes features and their coordinates atomically.

    Args:
        path: The file.
        features: float `(N, dim)`.
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        encoder: Name of the encoder that computed the features.
        attributes: Attributes of the coordinates, for instance those of the coordinates file.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "slide.h5"
        >>> coords = np.array([[0, 0], [256, 0], [0, 256]])
        >>> write_features(file, np.ones((3, 1024), np.float32), coords, encoder="uni")
        >>> features, coords = read_features(file)
        >>> features.shape, coords.shape
        ((3, 1024), (3, 2))
    """
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ValueError(
            f"features {features.shape} and coords {coords.shape}: expected (N, dim) and (N, 2)"
        )
    datasets = {"features": (features, {"encoder": encoder}), "coords": (coords, attributes or {})}
    _write(path, datasets, {"encoder": encoder})


def read_features(path: StrPath) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Reads features `(N, dim)` and coordinates `(N, 2)` of this package, TRIDENT or CLAM.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a dataset is missing, lengths differ, coordinates are not whole numbers, or
            features are not finite.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features {path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            if missing := {"features", "coords"} - set(file):
                names = " and ".join(map(repr, sorted(missing)))
                raise ValueError(f"no dataset {names} in it, only {sorted(file)}")
            features, coords = np.asarray(file["features"]), np.asarray(file["coords"])
    except (OSError, ValueError, TypeError) as error:  # TypeError: a group in place of a dataset
        kind = "" if h5py.is_hdf5(path) else "not an HDF5 file: "
        raise ValueError(f"features {path}: {kind}{error}") from error
    if features.ndim == 3 and len(features) == 1:  # TRIDENT's slide-level writers keep a batch of 1
        features = features[0]
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ValueError(f"features {path}: {features.shape} features, {coords.shape} coordinates")
    if features.dtype.kind not in "fiu" or not _are_whole(coords):
        raise ValueError(
            f"features {path}: expected numbers with whole coordinates, found features of type "
            f"{features.dtype} and coordinates of type {coords.dtype}"
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        first = int((~finite).argmax())
        raise ValueError(
            f"features {path}: {int((~finite).sum())} of {len(features)} rows hold NaN or "
            f"infinity, the first at {coords[first].tolist()}; compute them again, in bf16 or fp32 "
            "if they were computed in fp16"
        )
    return features, coords.astype(np.int64)


def read_attributes(path: StrPath) -> dict[str, Any]:
    """Returns the attributes of `coords`, to copy to the features computed from them."""
    import h5py

    with h5py.File(path, "r") as file:
        return dict(file["coords"].attrs)


def read_feature_attributes(path: StrPath) -> dict[str, Any]:
    """Returns the attributes of a features file, see `pathcore.encoders.origin`."""
    import h5py

    with h5py.File(path, "r") as file:
        return feature_attributes(file)


def _trident_attributes(slide: Slide, tiling: Tiling, name: str) -> dict[str, Any]:
    spec, (width, height) = tiling.spec, slide.dimensions
    # TRIDENT scales patches by the quotient of both magnifications, so the quotient must equal our
    # scale exactly. That 0.5 um/px is 20x (10 / mpp) is the convention of its own code.
    target = _whole(10 / spec.mpp)
    return {
        "patch_size": spec.patch_px,
        "patch_size_level0": tiling.size_level0,
        "level0_magnification": _whole(target * tiling.size_level0 / spec.patch_px),
        "target_magnification": target,
        "overlap": spec.overlap_px,
        "name": name,
        "savetodir": "",
        "level0_width": width,
        "level0_height": height,
        "mpp": spec.mpp,
        "mpp_level0": slide.mpp,
    }


def _clam_attributes(slide: Slide, level: int) -> dict[str, Any]:
    size = np.array(slide.level_dimensions[level])
    return {
        "patch_level": level,
        "downsample": np.full(2, slide.level_downsamples[level]),
        "downsampled_level_dim": size,
        "level_dim": size,
        "save_path": "",
    }


def _sizes(path: Path, attributes: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the side of a patch in level-0 pixels and in pixels after scaling."""
    try:
        patch_size = int(_number(attributes["patch_size"]))
        if "patch_px" in attributes:
            sizes = (patch_size, int(_number(attributes["patch_px"])))
        elif "patch_size_level0" in attributes:
            sizes = (int(_number(attributes["patch_size_level0"])), patch_size)
        elif "target_magnification" in attributes:
            level0, target = (_number(attributes[f"{n}_magnification"]) for n in _MAGNIFICATIONS)
            sizes = (round(patch_size * level0 / target), patch_size)
        else:
            # `custom_downsample` of old CLAM forks is a further factor by which patches are
            # downscaled; TRIDENT respects it, so 256 px at level 0 with a factor of 2 span 512 px.
            factor = _number(attributes.get("custom_downsample", 1))
            downsample = attributes["downsample"] if _number(attributes["patch_level"]) else 1.0
            span = patch_size * float(np.ravel(downsample)[0]) * factor
            sizes = (round(span), patch_size)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"coordinates {path}: expected attributes patch_size with patch_size_level0 (TRIDENT), "
            f"or with patch_level and downsample (CLAM), found {sorted(attributes)} ({error!r})"
        ) from error
    if min(sizes) < 1:
        raise ValueError(f"coordinates {path}: patches of {sizes} pixels")
    return sizes


def _write(
    path: StrPath,
    datasets: Mapping[str, tuple[NDArray[Any], Mapping[str, Any]]],
    attributes: Mapping[str, Any],
) -> None:
    import h5py

    with atomic_file(path) as partial, h5py.File(partial, "w") as file:
        for name, (values, own) in datasets.items():
            file.create_dataset(name, data=values).attrs.update(own)
        file.attrs.update(attributes)


def _number(value: Any) -> float:
    """Converts an attribute to a number; some tools store numbers as arrays of one element."""
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"expected one number, found {value!r:.60}")
    return float(array.reshape(()))


def _are_whole(coords: NDArray[Any]) -> bool:
    if coords.dtype.kind == "f":
        # False for NaN, and for infinity and others that int64 cannot hold.
        places = coords.astype(np.float64)
        return bool(np.all((places == np.round(places)) & (np.abs(places) < 2.0**63)))
    return coords.dtype.kind in "iu"


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)

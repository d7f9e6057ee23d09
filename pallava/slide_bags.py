"""Tile features of whole slides, read from the HDF5 files that tile encoders write.

`features/<encoder>/<slide>.h5` holds `features` `(N, D)` in float16 or float32 and `coords`
`(N, 2)`, the top left corner of each tile in level-0 pixels; attributes of `coords` give the tile
size in TRIDENT's or CLAM's form. A slide encoder's `<slide>.h5` holds `features` `(D,)` or
`(1, D)`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathcore.encoders.origin import TileOrigin, feature_attributes
from pathcore.encoders.presets import known_encoder
from pathcore.files import StrPath
from pathcore.images import ImageError, path_inside

if TYPE_CHECKING:
    import h5py

MAX_TILES = 1_000_000
"""Default limit on the bag size; 200,000 x 200,000 px hold 610,000 tiles of 256 px."""

SUFFIX = ".h5"

_logger = logging.getLogger(__name__)

_THREADS = 16  # opening files is bound by the latency of disk or network
_MOST_OVERLAPPING = 64  # tiles per grid cell: a stride of an eighth of the tile side


class SlideBagError(ImageError):
    """Raised for an unusable bag; datasets and commands treat it as an unreadable image."""


class SlideBag(NamedTuple):
    """The tiles of one slide.

    It is a named tuple because data loaders, MMEngine and DDP know how to move those to a device.

    Attributes:
        features: `(N, D)`, in the stored dtype.
        positions: float32 `(N, 2)`: left and top in units of the tile side, from the slide's
            corner.
        slide_embedding: `(E,)` slide-level embedding, or None.
        frame: float32 `(2, 2)`: lowest and highest position of all tiles of the slide; None if the
            bag holds them all.
    """

    features: Tensor
    positions: Tensor
    slide_embedding: Tensor | None = None
    frame: Tensor | None = None

    def to(self, device: torch.device | str) -> SlideBag:
        """Returns the bag on another device."""
        parts = (None if part is None else part.to(device) for part in self)
        return SlideBag(*parts)  # type: ignore[arg-type]

    def part(self, kept: Tensor) -> SlideBag:
        """Returns a bag with some of the tiles, which keep their positions in the tissue.

        Args:
            kept: Boolean `(N,)`, or indices.
        """
        return self._replace(
            features=self.features[kept], positions=self.positions[kept], frame=self.extent()
        )

    def extent(self) -> Tensor:
        """Returns `frame`, or the lowest and highest position of the tiles, `(2, 2)`."""
        if self.frame is not None:
            return self.frame
        return torch.stack([self.positions.amin(dim=0), self.positions.amax(dim=0)])


@dataclass(frozen=True)
class BagIndex:
    """Sizes of many bags, read from their headers.

    Attributes:
        num_tiles: Number of tiles by slide name.
        errors: Reason why a bag cannot be used, by slide name.
    """

    num_tiles: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BagFolder:
    """Folder of bags, addressed by the slide names that data rows contain.

    Args:
        folder: Folder of `<slide>.h5` files; names may contain sub-folders and may omit the suffix.
        in_features: Expected width of the features; None accepts any.
        slide_embeddings: Folder with the slide encoder's files under the same names, or None.
        tile_size_level0: Tile side in level-0 pixels, for files that do not state it.
        max_tiles: Maximum number of tiles; larger bags are rejected.
        origin: Encoder and tiles that the features must come from.

    Raises:
        FileNotFoundError: If a folder does not exist.
    """

    folder: Path
    in_features: int | None = None
    slide_embeddings: Path | None = None
    tile_size_level0: int | None = None
    max_tiles: int = MAX_TILES
    origin: TileOrigin = field(default_factory=TileOrigin)

    def __post_init__(self) -> None:
        for folder in (self.folder, self.slide_embeddings):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"folder of slide features {folder}: no such folder")

    def read(self, name: str) -> SlideBag:
        """Reads the bag of a slide.

        Raises:
            SlideBagError: If the name points outside the folder, or the bag cannot be used.
        """
        bag = read_bag(
            self._path(self.folder, name),
            in_features=self.in_features,
            tile_size_level0=self.tile_size_level0,
            max_tiles=self.max_tiles,
            origin=self.origin,
        )
        if self.slide_embeddings is None:
            return bag
        embedding = read_slide_embedding(self._path(self.slide_embeddings, name))
        return bag._replace(slide_embedding=embedding)

    def index(self, names: Iterable[str]) -> BagIndex:
        """Reads the headers of the named bags, in parallel threads."""
        names, index = list(names), BagIndex()

        def measure(name: str) -> tuple[str, int, str]:
            try:
                if self.slide_embeddings is not None:
                    read_slide_embedding(self._path(self.slide_embeddings, name))
                with _opened(self._path(self.folder, name)) as file:
                    num_tiles, _ = _check_shapes(file, self.in_features, self.max_tiles)
                    _check_origin(self.origin, feature_attributes(file), file.filename)
                    return name, num_tiles, ""
            except SlideBagError as error:
                return name, 0, str(error)

        with ThreadPoolExecutor(max_workers=min(_THREADS, len(names) or 1)) as pool:
            for name, num_tiles, error in pool.map(measure, names):
                if error:
                    index.errors[name] = error
                else:
                    index.num_tiles[name] = num_tiles
        return index

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        if not name.endswith(SUFFIX):
            name += SUFFIX
        try:
            return path_inside(folder, name)
        except ImageError as error:
            raise SlideBagError(f"slide {name}: resolves to a path outside {folder}") from error


@dataclass(frozen=True)
class SlidePreparation:
    """Input preparation of a whole-slide model: reads files of tile features.

    Args:
        in_features: Width of the tile features that the model expects.
        slide_embedding_features: Width of the slide embedding that the model expects; 0 for none.
        origin: Encoder and tiles that the features must come from.
        embed: Function that computes the features of a slide and returns their file; without it,
            only files of features can be read.
    """

    in_features: int
    slide_embedding_features: int = 0
    origin: TileOrigin = field(default_factory=TileOrigin)
    embed: Callable[[Path], Path] | None = None

    def features_file(self, path: StrPath) -> Path:
        """Returns the features file of a slide, computed if necessary, or `path` if it is one.

        Raises:
            SlideBagError: If the slide cannot be embedded.
        """
        path = Path(path)
        if path.suffix == SUFFIX:
            return path
        if self.embed is None:
            raise SlideBagError(
                f"{path}: this model reads tile features ({SUFFIX}); compute those of a slide with "
                "`xtuner-add embed`"
            )
        return self.embed(path)

    def __call__(self, path: Any) -> SlideBag:
        """Reads a file of tile features, or a slide if `embed` is given.

        If the model takes slide embeddings, `<slide>.embedding.h5` beside the file is read as well.

        Raises:
            SlideBagError: If `path` is not a path, or the file cannot be used.
        """
        if not isinstance(path, str | os.PathLike):
            raise SlideBagError(
                f"{type(path).__name__}: this model reads whole slides; expected a file of tile "
                "features (features, coords) in HDF5"
            )
        path = self.features_file(path)
        bag = read_bag(path, in_features=self.in_features, origin=self.origin)
        if not self.slide_embedding_features:
            return bag
        return bag._replace(slide_embedding=read_slide_embedding(embedding_beside(path)))


def embedding_beside(path: StrPath) -> Path:
    """Returns the slide embedding path beside a tile feature file: `<slide>.embedding.h5`."""
    return Path(path).with_suffix(f".embedding{SUFFIX}")


def read_bag(
    path: StrPath,
    *,
    in_features: int | None = None,
    tile_size_level0: int | None = None,
    max_tiles: int = MAX_TILES,
    origin: TileOrigin | None = None,
) -> SlideBag:
    """Reads tile features and their positions.

    Args:
        path: HDF5 file.
        in_features: Expected width of the features; None accepts any.
        tile_size_level0: Tile side in level-0 pixels, for files that do not state it.
        max_tiles: Maximum number of tiles; larger bags are rejected.
        origin: Encoder and tiles that the features must come from.

    Raises:
        SlideBagError: If the file does not exist, is not HDF5 or is truncated, holds no tiles,
            holds arrays that do not match each other or the encoder, contains NaN or infinity, or
            its coordinates are not in level-0 pixels.
    """
    with _opened(Path(path)) as file:
        num_tiles, _ = _check_shapes(file, in_features, max_tiles)
        features = np.asarray(file["features"]).reshape(num_tiles, -1)
        coords, attributes = np.asarray(file["coords"]), feature_attributes(file)
        _check_origin(origin or TileOrigin(), attributes, path)
    if features.dtype not in (np.float16, np.float32):
        features = features.astype(np.float32)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise SlideBagError(
            f"slide features {path}: {int(bad.sum())} of {num_tiles} tiles hold NaN or infinity, "
            f"the first is row {int(bad.argmax())}; compute them again"
        )
    if not np.array_equal(coords, np.round(coords)):
        raise SlideBagError(f"slide features {path}: coords are not whole level-0 pixels")
    coords = coords.astype(np.int64)
    side = tile_size_level0 or _tile_size(Path(path), coords, attributes)
    return SlideBag(torch.from_numpy(features), _positions(Path(path), coords, side))


def read_squares(path: StrPath) -> tuple[NDArray[np.int64], int]:
    """Returns left and top `(N, 2)` of the tiles of a features file, and their side.

    Both are in level-0 pixels.

    Raises:
        SlideBagError: If the file cannot be read or does not state the side of a tile.
    """
    with _opened(Path(path)) as file:
        coords, attributes = np.asarray(file["coords"]).astype(np.int64), feature_attributes(file)
    return coords, _tile_size(Path(path), coords, attributes)


def read_slide_embedding(path: StrPath) -> Tensor:
    """Reads a slide-level embedding `(E,)` as float32.

    Raises:
        SlideBagError: If the file does not exist or does not hold exactly one finite vector.
    """
    with _opened(Path(path)) as file:
        if not hasattr(file.get("features"), "shape"):
            raise SlideBagError(f"slide embedding {path}: no dataset 'features', {_listed(file)}")
        values = np.asarray(file["features"], dtype=np.float32)
    if values.ndim == 0 or values.size != values.shape[-1] or not values.size:
        raise SlideBagError(
            f"slide embedding {path}: expected one vector (E,) or (1, E), found {values.shape}"
        )
    if not np.isfinite(values).all():
        raise SlideBagError(f"slide embedding {path}: holds NaN or infinity; compute it again")
    return torch.from_numpy(values.reshape(-1))


@contextmanager
def _opened(path: Path) -> Any:
    """Opens an HDF5 file; errors raised by h5py inside the block become `SlideBagError`."""
    import h5py

    try:
        if not path.is_file():
            raise SlideBagError(f"slide features {path}: no such file")
        with h5py.File(path, "r") as file:
            yield file
    except SlideBagError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise SlideBagError(
            f"slide features {path}: cannot be read as HDF5, half-written or damaged: {error}"
        ) from error


def _check_shapes(file: h5py.File, in_features: int | None, max_tiles: int) -> tuple[int, int]:
    """Returns the number of tiles and the feature width, from the header alone."""
    path = file.filename
    absent = [name for name in ("features", "coords") if not hasattr(file.get(name), "shape")]
    if absent:
        raise SlideBagError(
            f"slide features {path}: no dataset {' and '.join(absent)}, {_listed(file)}"
        )
    shape, places = tuple(file["features"].shape), tuple(file["coords"].shape)
    if len(shape) == 3 and shape[0] == 1:  # some writers keep a batch dimension of one
        shape = shape[1:]
    if len(shape) != 2 or places != (shape[0], 2):
        raise SlideBagError(
            f"slide features {path}: features {shape} and coords {places}, expected (N, D) and "
            "(N, 2) for equally many tiles"
        )
    if any(file[name].dtype.kind not in "fiu" for name in ("features", "coords")):
        raise SlideBagError(f"slide features {path}: features or coords are no numbers")
    if shape[0] == 0:
        raise SlideBagError(f"slide features {path}: no tile; was no tissue found?")
    if shape[0] > max_tiles:
        raise SlideBagError(
            f"slide features {path}: {shape[0]:,} tiles, at most {max_tiles:,} allowed (max_tiles)"
        )
    if in_features is not None and shape[1] != in_features:
        raise SlideBagError(
            f"slide features {path}: {shape[1]} wide, the model takes {in_features}; they are of "
            f"another encoder ({feature_attributes(file).get('encoder', 'not named')})"
        )
    return shape[0], shape[1]


def _check_origin(expected: TileOrigin, attributes: Mapping[str, Any], where: object) -> None:
    """Checks that a file of features has the expected origin, as far as both state it.

    Other tools' names of unknown encoders, such as a folder of weights, cannot be compared and are
    only logged.

    Raises:
        SlideBagError: If the features come from another encoder or from other tiles.
    """
    found = TileOrigin.read(attributes)
    encoder = known_encoder(expected.encoder) or expected.encoder
    other_encoder = bool(encoder and found.encoder and encoder != found.encoder)
    if other_encoder and not (attributes.get("encoder_name") or known_encoder(found.encoder)):
        _logger.warning("%s: features of %s, taken as those of %s", where, found.encoder, encoder)
        other_encoder = False
    other_px = found.patch_px not in (0, expected.patch_px) and expected.patch_px
    if other_encoder or other_px or not found.fits_mpp(expected.mpp):
        raise SlideBagError(
            f"slide features {where}: of {found}; the model was trained on {expected}; compute "
            "them again with `xtuner-add embed --tile-encoder NAME --patch-px N --mpp X`"
        )


def _tile_size(path: Path, coords: NDArray[np.int64], attributes: Mapping[str, Any]) -> int:
    """Returns the tile side in level-0 pixels, from the attributes or the grid spacing."""
    try:
        if "patch_size_level0" in attributes:
            side = int(attributes["patch_size_level0"])
        elif "target_magnification" in attributes:
            scale = float(attributes["level0_magnification"]) / float(
                attributes["target_magnification"]
            )
            side = round(int(attributes["patch_size"]) * scale)
        elif "patch_level" in attributes:
            downsample = np.ravel(attributes["downsample"])[0] if attributes["patch_level"] else 1
            side = round(int(attributes["patch_size"]) * float(downsample))
        else:
            side = _grid_step(coords)
    except (KeyError, TypeError, ValueError) as error:
        raise SlideBagError(
            f"slide features {path}: attributes of coords do not say how large a tile is: {error}"
        ) from error
    if side < 1:
        raise SlideBagError(
            f"slide features {path}: the side of a tile is not stated (attribute "
            "patch_size_level0 of coords) and the coordinates form no grid; say tile_size_level0"
        )
    return side


def _grid_step(coords: NDArray[np.int64]) -> int:
    """Returns the spacing of a regular grid; 0 if there is none, 1 for a single tile."""
    if len(coords) == 1:
        return 1
    offsets = coords - coords.min(axis=0)
    step = int(np.gcd.reduce(offsets, axis=None))
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in offsets.T])
    return step if gaps.size and step == gaps.min() else 0


def _positions(path: Path, coords: NDArray[np.int64], side: int) -> Tensor:
    positions = coords / side
    num_places = len(np.unique(np.floor(positions), axis=0))
    if len(coords) > _MOST_OVERLAPPING * num_places:
        raise SlideBagError(
            f"slide features {path}: {len(coords)} tiles of {side} px are at {num_places} "
            "position(s); are the coordinates in level-0 pixels?"
        )
    return torch.from_numpy(positions.astype(np.float32))


def _listed(file: h5py.File) -> str:
    return f"found {', '.join(sorted(file)[:8]) or 'nothing'}"

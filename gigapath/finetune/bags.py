"""Bags of tile embeddings, read from `.h5` or `.pt` files on demand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gigapath.embed.slide_vectors import onto_slide
from gigapath.pos_embed import check_coords
from gigapath.published.embedding_zip import load_tensors
from pathcore.files import StrPath, check_name, write_json
from wsi.features import check_features
from wsi.store import read_attributes, read_feature_attributes, read_features

Value = TypeVar("Value")

SUFFIXES = (".h5", ".pt")

PT_LIMIT_BYTES = 64 << 30
"""Maximum inflated size of the `.pt` file of a slide. A million tiles of 1536 values take 6 GB."""

CELL_PX = 256
"""Side of the grid cells to which coordinates are scaled if cells follow each file's tile size."""


@dataclass(frozen=True)
class Bag:
    """The tiles of a slide.

    Attributes:
        slide: Id of the slide.
        features: float32 `(num_tiles, in_chans)`.
        coords: int64 `(num_tiles, 2)`, x and y in level-0 pixels; zeros if the file has none.
    """

    slide: str
    features: Tensor
    coords: Tensor


@dataclass(frozen=True)
class SlideFolder:
    """Folder of tile embeddings, one file per slide.

    `SLIDE.h5` holds `features` and `coords`. `SLIDE.pt` holds a mapping of both, or the features
    alone, which suffices for models without positions. Ids may end in `.svs`, as in the published
    tables.

    Attributes:
        path: The folder.
        needs_coords: Whether files without coordinates are refused.
        slides_of: Slides of ids that cover several, such as patients; their tiles become one
            bag.
        cell_px: Side of a cell of the encoder's grid in level-0 pixels; slides with tiles that
            start less than a cell outside the grid are shifted onto it. 0 for the tile size of each
            file, with coordinates scaled to cells of `CELL_PX`. None to keep the coordinates.
    """

    path: Path
    needs_coords: bool = True
    cell_px: int | None = None
    slides_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def file(self, slide: str) -> Path:
        """Returns the file of a slide.

        Raises:
            FileNotFoundError: If there is neither `.h5` nor `.pt`.
            UnsafeNameError: If the id cannot be a file name.
        """
        stem = check_name(slide.removesuffix(".svs"), room_bytes=len(SUFFIXES[0]))
        for suffix in SUFFIXES:
            if (self.path / f"{stem}{suffix}").is_file():
                return self.path / f"{stem}{suffix}"
        raise FileNotFoundError(f"{self.path}: no {stem}.h5 or {stem}.pt")

    def files(self, sample: str) -> list[Path]:
        """Returns the files of the slides of a sample; see `file`."""
        return [self.file(slide) for slide in self.slides_of.get(sample, (sample,))]

    def identity(self, sample: str) -> list[list[Any]]:
        """Returns name, size and modification time of each file; see `files`."""
        found = [(file.name, file.stat()) for file in self.files(sample)]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in found]

    def read(self, slide: str) -> Bag:
        """Reads a slide, or all slides of a sample.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged, has no tiles or lacks coordinates, or if features are not
                finite.
        """
        bags = [self._read(slide, file) for file in self.files(slide)]
        if len(widths := {bag.features.shape[1] for bag in bags}) > 1:
            raise ValueError(f"{slide}: its slides have features of widths {sorted(widths)}")
        return Bag(
            slide, torch.cat([bag.features for bag in bags]), torch.cat([b.coords for b in bags])
        )

    def _read(self, slide: str, file: Path) -> Bag:
        features, coords = read_features(file) if file.suffix == ".h5" else self._read_pt(file)
        check_features(features, coords, str(file))
        values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
        return Bag(slide, values, self._onto_grid(torch.from_numpy(coords), file))

    def slides(self) -> list[str]:
        """Returns the ids of all files."""
        return sorted({p.stem for p in self.path.iterdir() if p.suffix in SUFFIXES})

    def encoder(self, slide: str) -> str:
        """Returns the encoder's name and digest that a slide's file states; empty if it does not.

        Raises:
            ValueError: If the slides of a sample give different ones.
        """
        found = {self._encoder(file) for file in self.files(slide)}
        if len(found) > 1:
            raise ValueError(f"{slide}: its slides have features of encoders {sorted(found)}")
        return found.pop()

    def _encoder(self, file: Path) -> str:
        if file.suffix != ".h5":
            return ""
        stated = read_feature_attributes(file)
        name, digest = (str(stated.get(key, "")) for key in ("encoder", "weights_sha256"))
        return f"{name} {digest[:12]}".strip()

    def _onto_grid(self, coords: Tensor, file: Path) -> Tensor:
        if self.cell_px is None:
            return coords
        if self.cell_px:
            return onto_slide(coords, self.cell_px)
        side = read_attributes(file).get("patch_size_level0") if file.suffix == ".h5" else None
        if not side:
            raise ValueError(f"{file}: tile_size 0 needs the attribute patch_size_level0 of coords")
        cells = onto_slide(coords, int(side)).div(int(side), rounding_mode="floor")
        return cells * CELL_PX

    def _read_pt(self, file: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
        value = load_tensors(file.read_bytes(), PT_LIMIT_BYTES)
        features, coords = value, None
        if isinstance(value, Mapping):
            features, coords = value.get("features"), value.get("coords")
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(f"{file}: expected a tensor (num_tiles, dim), or features and coords")
        if coords is None:
            if self.needs_coords:
                raise ValueError(f"{file}: no coords, which the slide encoder needs")
            coords = torch.zeros(len(features), 2)
        if not isinstance(coords, Tensor) or coords.shape != (len(features), 2):
            raise ValueError(
                f"{file}: expected coords ({len(features)}, 2), "
                f"found {getattr(coords, 'shape', coords)!s:.40}"
            )
        return features.float().numpy(), coords.numpy().astype(np.int64)


class ScanResult(NamedTuple):
    """Result of `SlideScan`.

    Attributes:
        num_tiles: Number of tiles of each usable slide.
        skipped: `id` and `reason` of the other slides.
        encoder: Name of the tile encoder, as the files give it; empty if they do not.
        in_chans: Width of the embeddings.
    """

    num_tiles: dict[str, int]
    skipped: list[dict[str, str]]
    encoder: str
    in_chans: int


class SlideScan(Dataset[dict[str, Any]]):
    """Reads every slide once before training, so that damaged files do not stop it halfway.

    Args:
        folder: The embeddings.
        slides: Slide ids.
        in_chans: Expected width of the embeddings; 0 for the width that most files have.
        grid: Side of a cell in level-0 pixels and number of cells, to check coordinates.
    """

    def __init__(
        self,
        folder: SlideFolder,
        slides: Sequence[str],
        in_chans: int,
        grid: tuple[int, int] | None,
    ) -> None:
        self.folder, self.all_slides, self.in_chans = folder, tuple(slides), in_chans
        self.grid, self.slides = grid, tuple(slides)

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        slide = self.slides[index]
        try:
            bag = self.folder.read(slide)
            if self.in_chans and bag.features.shape[1] != self.in_chans:
                raise ValueError(
                    f"features of width {bag.features.shape[1]}; input_dim is {self.in_chans}"
                )
            if self.grid is not None:
                check_coords(bag.coords, *self.grid)
            encoder = self.folder.encoder(slide)
        except (ValueError, TypeError, OSError) as error:
            return {"id": slide, "reason": str(error)}
        count, width = bag.features.shape
        return {
            "id": slide,
            "num_tiles": count,
            "in_chans": width,
            "encoder": encoder,
        }

    def run(
        self, cache: Path | None = None, *, num_workers: int = 0, progress: bool = False
    ) -> ScanResult:
        """Scans the slides.

        Slides whose encoder is not that of most slides are skipped, see `one_encoder`.

        Args:
            cache: JSON file that keeps the result of each file until the file changes.
            num_workers: Number of reading processes.
            progress: Whether to show a progress bar.
        """
        known = self._known(cache)
        found = {s: known[s] for s in self.all_slides if known.get(s, {}).get("as") == self._as(s)}
        self.slides = tuple(slide for slide in self.all_slides if slide not in found)
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        with tqdm(loader, desc="checking slides", disable=not progress) as rows:
            for row in rows:
                found[row["id"]] = {**row, "as": self._as(row["id"])}
        self.slides = self.all_slides
        if cache is not None:
            write_json(cache, list(found.values()))
        rows = [row for row in found.values() if "num_tiles" in row]
        width, encoder, others = one_encoder(
            {row["id"]: (row["in_chans"], row["encoder"]) for row in rows}
        )
        num_tiles, skipped = {}, []
        for slide in self.all_slides:
            if reason := found[slide].get("reason") or others.get(slide):
                skipped.append({"id": slide, "reason": reason})
            else:
                num_tiles[slide] = int(found[slide]["num_tiles"])
        return ScanResult(num_tiles, skipped, encoder, width or self.in_chans)

    def _known(self, cache: Path | None) -> dict[str, dict[str, Any]]:
        if cache is None or not cache.is_file():
            return {}
        return {row["id"]: row for row in json.loads(cache.read_text(encoding="utf-8"))}

    def _as(self, slide: str) -> list[Any]:
        """Returns identity of the files and scan settings, which make a cached row valid."""
        folder = self.folder
        asked = [self.in_chans, list(self.grid or ()), folder.needs_coords, folder.cell_px]
        try:
            return [*folder.identity(slide), *asked]
        except (OSError, ValueError):
            return asked


def one_encoder(found: Mapping[str, tuple[int, str]]) -> tuple[int, str, dict[str, str]]:
    """Finds the slides that do not have the encoder of most slides.

    Embeddings of different encoders cannot be compared, even if they have the same width.

    Args:
        found: Width and encoder of each slide's embeddings; the encoder is empty if the file does
            not name it, as files of other tools may not.

    Returns:
        Width and encoder of most slides, and the reason against each of the other slides.
    """
    width = _most([own for own, _ in found.values()], 0)
    encoder = _most([name for _, name in found.values() if name], "")
    others = {}
    for slide, (own, name) in found.items():
        if own != width:
            others[slide] = f"features of width {own}; most slides have width {width}"
        elif name not in ("", encoder):
            others[slide] = f"features of encoder {name}; most slides have {encoder}'s"
    return width, encoder, others


def _most(values: Sequence[Value], default: Value) -> Value:
    """Returns the most frequent value; in a tie, the one that occurs first."""
    return Counter(values).most_common(1)[0][0] if values else default


def choose_tiles(
    bag: Bag, max_tiles: int, tile_order: str, *, shuffle: bool = False, seed: int = 0
) -> Bag:
    """Selects and orders the tiles of a slide.

    Args:
        bag: The slide.
        max_tiles: Maximum number of tiles; 0 for all.
        tile_order: `row_major`: a random subset, sorted by row and column as in the pretraining of
            the slide encoder. `published`: the first tiles of the file, or of a random order with
            `shuffle`.
        shuffle: Whether the order `published` is random, as tasks with `shuffle_tiles` ask.
        seed: Seed of subset and order.
    """
    count = len(bag.features)
    generator = torch.Generator().manual_seed(seed)
    if tile_order == "published":
        order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
        order = order[: max_tiles or count]
    else:
        places = bag.coords.numpy()
        order = torch.from_numpy(np.lexsort((places[:, 0], places[:, 1])))
        if 0 < max_tiles < count:
            kept = torch.randperm(count, generator=generator)[:max_tiles].sort().values
            order = order[kept]
    return Bag(bag.slide, bag.features[order], bag.coords[order])


def derived_seed(*parts: int) -> int:
    """Derives an independent seed from numbers such as run, epoch and slide."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Batch:
    """Padded bags of several slides.

    Attributes:
        indices: Indices of the slides in `SlideBags.slides`.
        features: float32 `(num_slides, most_tiles, in_chans)`, padded with zeros at the end.
        coords: int64 `(num_slides, most_tiles, 2)`.
        lengths: Number of tiles per slide.
        labels: int64 `(num_slides,)`, or `(num_slides, num_classes)` for multi-label tasks; float64
            `(num_slides, 2)` for survival.
    """

    indices: tuple[int, ...]
    features: Tensor
    coords: Tensor
    lengths: tuple[int, ...]
    labels: Tensor


class SlideBags(Dataset[Batch]):
    """Data set of batches, indexed by `(slide indices, seed)`.

    The seed is part of the index, so that the tiles of a batch depend neither on the worker process
    that reads it nor on where a run was resumed.

    Args:
        folder: The embeddings.
        slides: Slide ids.
        labels: Label of each slide.
        max_tiles: Maximum number of tiles per slide; 0 for all.
        tile_order: `row_major` or `published`, see `choose_tiles`.
        shuffle: Whether the order `published` is random.
    """

    def __init__(
        self,
        folder: SlideFolder,
        slides: Sequence[str],
        labels: Mapping[str, NDArray[Any]],
        *,
        max_tiles: int = 0,
        tile_order: str = "row_major",
        shuffle: bool = False,
    ) -> None:
        self.folder, self.slides = folder, tuple(slides)
        self.labels = np.stack([labels[slide] for slide in slides])
        self.max_tiles, self.tile_order, self.shuffle = max_tiles, tile_order, shuffle

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, key: tuple[Sequence[int], int]) -> Batch:
        numbers, seed = key
        bags = []
        for number in numbers:
            bags.append(
                choose_tiles(
                    self.folder.read(self.slides[number]),
                    self.max_tiles,
                    self.tile_order,
                    shuffle=self.shuffle,
                    seed=derived_seed(seed, number),
                )
            )
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            tuple(numbers),
            pad([bag.features for bag in bags], batch_first=True),
            pad([bag.coords for bag in bags], batch_first=True),
            tuple(len(bag.features) for bag in bags),
            torch.from_numpy(self.labels[list(numbers)]),
        )

    def loader(
        self, keys: Sequence[tuple[Sequence[int], int]], num_workers: int = 0
    ) -> DataLoader[Batch]:
        """Returns a loader of the batches with these keys, in their order."""
        return DataLoader(self, batch_size=None, sampler=keys, num_workers=num_workers)  # type: ignore[arg-type]


def pooled_vectors(
    folder: SlideFolder, slides: Sequence[str], *, progress: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Returns the mean over the tiles `(in_chans,)` of each slide."""
    shown = tqdm(slides, desc="mean over tiles", disable=not progress)
    return {slide: folder.read(slide).features.mean(dim=0).numpy() for slide in shown}


def stored_vectors(
    folder: StrPath,
    slides: Sequence[str],
    slides_of: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[dict[str, NDArray[np.float32]], list[dict[str, str]]]:
    """Reads slide embeddings, one `.h5` with `features` or one `.pt` with a tensor per slide.

    The embedding of a sample of several slides (see `SlideFolder`) is the mean of theirs.

    Returns:
        The embedding `(embed_dim,)` of each slide, and `id` and `reason` of slides without a usable
        one, which includes those of another encoder than most, see `one_encoder`.

    Raises:
        ValueError: If no slide has one.
    """
    source = SlideFolder(Path(folder), slides_of=slides_of or {})
    vectors, names, bad = {}, {}, []
    for slide in slides:
        try:
            names[slide] = source.encoder(slide)
            vectors[slide] = np.mean([_read_vector(file) for file in source.files(slide)], axis=0)
        except (ValueError, OSError) as error:
            bad.append({"id": slide, "reason": str(error)})
    if not vectors:
        raise ValueError(f"slide embeddings {folder}: none can be used: {bad[:1]}")
    _, _, others = one_encoder({s: (len(vector), names[s]) for s, vector in vectors.items()})
    bad += [{"id": slide, "reason": reason} for slide, reason in others.items()]
    return {slide: vector for slide, vector in vectors.items() if slide not in others}, bad


def _read_vector(file: Path) -> NDArray[np.float32]:
    if file.suffix == ".h5":
        try:
            with h5py.File(file, "r") as opened:
                value = np.asarray(opened["features"])
        except KeyError as error:
            raise ValueError(f"{file}: {error}") from error
    else:
        loaded = load_tensors(file.read_bytes())
        if not isinstance(loaded, Tensor):
            raise ValueError(f"{file}: expected a tensor, found {type(loaded).__name__}")
        value = loaded.float().numpy()
    vector = np.asarray(value, dtype=np.float32).squeeze()
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError(f"{file}: expected one finite vector, found shape {value.shape}")
    return vector

"""A real slide's map cut into regions, and questions about them with exact answers.

The package histolytics (https://github.com/HautaniemiLab/histolytics, BSD-3) ships the segmented
tissue and nuclei of a slide of ovarian carcinoma: 3,712 polygons of tissue and 592,349 nuclei. A
region is a rectangle of tiles of the map. The features of a tile are those of what it holds, by
area and by number of nuclei, plus noise; answers are computed from the polygons themselves.
Training and held-out regions lie in different blocks of the slide.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import shapely
from numpy.typing import NDArray
from tqdm import tqdm

from pathcore.files import atomic_file, write_json, write_text

STROMA, TUMOUR, NECROSIS, FAT, HAEMORRHAGE, SERUM = range(6)
NAMES = ("stroma", "tumour", "necrosis", "fat", "haemorrhage", "serum")
COLOURS = ("#f2c6d6", "#8e3a78", "#b9aab0", "#f7efd9", "#b03a3a", "#a9cfe0")
_CLASSES = ("stroma", "tumor", "necrosis", "omental_fat", "hemorragia", "serum")
_NUCLEI = ("connective", "inflammatory", "neoplastic", "dead", "macrophage_nucleus")
_COUNTED_IN_TUMOUR = ("inflammatory", "neoplastic")
_PAIRS = ((TUMOUR, FAT), (TUMOUR, HAEMORRHAGE), (FAT, HAEMORRHAGE), (STROMA, NECROSIS))
"""Kinds that touch in some regions and not in others; tumour touches its necrosis everywhere."""

SIDES = ("above", "below", "left", "right")
_ASIDE_TILES = 2

_WHICH = "Does the slide show {}?"
_HOW_MUCH = "How much of the tissue is tumour?"
_WHERE = "In which quarter is the {}?"
_TOUCHES = "Does {} touch {}?"
_SIDE = "On which side of the {1} is the {0}?"
_INFILTRATED = "Is the tumour infiltrated by inflammatory cells?"

_ASKED = 3  # number of questions per training conversation

PACKAGE = "histolytics==0.3.0"
IN_FEATURES = 32
TILE_PX = 128
"""Side of a tile in pixels of the map, which has about 0.5 um each: 256 px at 40x."""

REGION_TILES = (10, 18)
BLOCK_TILES = 64
_NOISE = 0.25
_SPREAD = 0.5  # of the vectors of kinds
_MANY_NUCLEI = 12  # per tile; the vector of a kind of nuclei counts fully from there
_MIN_TISSUE = 0.5  # of a tile, the default of `xtuner-add tile`

_PRESENT = 0.01  # share of the tissue from which a kind is asked about
AMOUNTS = {"little": (0.01, 0.2), "some": (0.3, 0.5), "much": (0.6, 1.0)}
QUARTERS = ("upper left", "upper right", "lower left", "lower right")
_TOUCH_PX = 8
"""Polygons this near touch: the segmentation leaves gaps of a few pixels."""

_CONTACT_TILES = 4  # of a clear contact
_APART_PX = TILE_PX
_CLEARLY = 0.2
"""A kind is in the half that holds this much more than half of it."""

_MIN_NUCLEI = 100
_INFLAMMATORY_SHARE = (0.015, 0.035)
"""Share of inflammatory among the nuclei in the tumour: sparse up to the first, dense from the
second."""


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what one must see to answer it."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Region:
    """A rectangle of tiles, turned and mirrored.

    Attributes:
        top: First row of tiles.
        left: First column of tiles.
        rows: Number of rows.
        columns: Number of columns.
        turns: Number of quarter turns, counterclockwise, after mirroring.
        mirrored: Whether left and right are exchanged.
    """

    top: int
    left: int
    rows: int
    columns: int
    turns: int = 0
    mirrored: bool = False

    @property
    def block(self) -> str:
        """Block of the slide that holds the region; regions of one block may overlap."""
        return f"{self.top // BLOCK_TILES}-{self.left // BLOCK_TILES}"

    def seen(self, tiles: NDArray[Any]) -> NDArray[Any]:
        """Returns the region of `(rows, columns, ...)` as it is shown."""
        part = tiles[self.top : self.top + self.rows, self.left : self.left + self.columns]
        return np.rot90(part[:, ::-1] if self.mirrored else part, self.turns)


class Tiles(NamedTuple):
    """Features `(N, D)` of tiles, and their column and row in the region, int64 `(N, 2)`."""

    features: NDArray[np.float64]
    places: NDArray[np.int64]

    def write(self, path: Path) -> None:
        """Writes the file that tile encoders write."""
        import h5py

        with atomic_file(path) as partial, h5py.File(partial, "w") as file:
            file.create_dataset("features", data=self.features.astype(np.float16))
            dataset = file.create_dataset("coords", data=self.places * TILE_PX)
            dataset.attrs["patch_size_level0"] = TILE_PX
            file.attrs["encoder"] = "made-up"


def corpus(seed: int) -> list[list[tuple[str, str]]]:
    """Returns chats with random answers, from which a language model learns the vocabulary."""
    rng = np.random.default_rng([seed, 8])
    asked = list(vocabulary().items())
    return [
        [(asked[i][0], str(rng.choice(asked[i][1]))) for i in rng.permutation(len(asked))[:_ASKED]]
        for _ in range(6000)
    ]


def vocabulary() -> dict[str, tuple[str, ...]]:
    """Returns all questions with their possible answers."""
    kinds = [NAMES[kind] for kind in (TUMOUR, NECROSIS, FAT, HAEMORRHAGE)]
    pairs = [(NAMES[one], NAMES[other]) for one, other in _PAIRS]
    return {
        **{_WHICH.format(kind): ("yes", "no") for kind in kinds},
        _HOW_MUCH: tuple(AMOUNTS),
        **{_WHERE.format(kind): QUARTERS for kind in kinds[1:]},
        **{_TOUCHES.format(*pair): ("yes", "no") for pair in pairs},
        **{_SIDE.format(*pair): SIDES for pair in pairs},
        _INFILTRATED: ("yes", "no"),
    }


def download(folder: Path) -> Path:
    """Downloads the package without its dependencies, unless it is in the folder already."""
    found = sorted(folder.glob("histolytics-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("histolytics-*.whl"))
    return found[0]


def read_polygons(wheel: Path, name: str) -> tuple[NDArray[Any], NDArray[np.str_]]:
    """Reads a GeoParquet file of the package: geometries and their classes."""
    import pyarrow.parquet
    from pyarrow import BufferReader

    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"histolytics/data/{name}.parquet")
    table = pyarrow.parquet.read_table(BufferReader(content), columns=["geometry", "class_name"])
    shapes = shapely.from_wkb(table.column("geometry").to_numpy())
    return shapes, np.array(table.column("class_name").to_pylist())


class RegionMap:
    """The map of a slide: what every tile holds, and the polygons for exact answers.

    Args:
        tissue: Polygons `(N,)` of tissue and their classes.
        nuclei: Polygons or points `(M,)` of nuclei and their classes.

    Attributes:
        areas: float32 `(rows, columns, kinds)`, the share of each tile that is of a kind.
        nuclei: float32 `(rows, columns, kinds)`, number of nuclei by kind.
        in_tumour: float32 `(rows, columns, 2)`, inflammatory and neoplastic nuclei in tumour.
    """

    def __init__(
        self,
        tissue: tuple[NDArray[Any], NDArray[np.str_]],
        nuclei: tuple[NDArray[Any], NDArray[np.str_]],
    ) -> None:
        shapes, classes = tissue
        right, bottom = shapely.total_bounds(shapes)[2:]
        self.shape = (int(np.ceil(bottom / TILE_PX)), int(np.ceil(right / TILE_PX)))
        self.areas = np.zeros((*self.shape, len(NAMES)), np.float32)
        side = 2 ** int(np.ceil(np.log2(max(self.shape))))
        parts: list[list[Any]] = [[] for _ in NAMES]
        tiles: list[list[tuple[int, int]]] = [[] for _ in NAMES]
        for shape, name in zip(shapes, classes, strict=True):
            kind = _CLASSES.index(name)
            for row, column, part in _cut(shape, 0, 0, side):
                self.areas[row, column, kind] += part.area / TILE_PX**2
                parts[kind].append(part)
                tiles[kind].append((row, column))
        self._parts = [np.array(each, dtype=object) for each in parts]
        self._tiles = [np.array(each, dtype=np.int64).reshape(-1, 2) for each in tiles]
        self._count_nuclei(*nuclei)
        rng = np.random.default_rng(0)
        self._vectors = _SPREAD * rng.standard_normal((len(NAMES) + len(_NUCLEI), IN_FEATURES))

    @classmethod
    def read(cls, wheel: Path) -> RegionMap:
        """Reads the map from the package, in about 20 s."""
        return cls(read_polygons(wheel, "hgsc_tissue_wsi"), read_polygons(wheel, "hgsc_nuclei_wsi"))

    def _count_nuclei(self, shapes: NDArray[Any], classes: NDArray[np.str_]) -> None:
        centres = shapely.centroid(shapes)
        within = np.zeros(len(centres), bool)
        within[shapely.STRtree(self._parts[TUMOUR]).query(centres, predicate="within")[0]] = True
        cells = (shapely.get_coordinates(centres) // TILE_PX).astype(np.int64)
        inside = ((cells >= 0) & (cells < self.shape[::-1])).all(axis=1)
        self.nuclei = np.zeros((*self.shape, len(_NUCLEI)), np.float32)
        self.in_tumour = np.zeros((*self.shape, 2), np.float32)
        for kind, name in enumerate(_NUCLEI):
            here = inside & (classes == name)
            np.add.at(self.nuclei[..., kind], tuple(cells[here].T[::-1]), 1)
            if name in _COUNTED_IN_TUMOUR:
                place = _COUNTED_IN_TUMOUR.index(name)
                here &= within
                np.add.at(self.in_tumour[..., place], tuple(cells[here].T[::-1]), 1)

    def features(self, region: Region, rng: np.random.Generator, noise: float = _NOISE) -> Tiles:
        """Returns the tiles of a region that are tissue, with noise in their features."""
        areas = region.seen(self.areas)
        nuclei = np.minimum(region.seen(self.nuclei) / _MANY_NUCLEI, 1)
        rows, columns = np.nonzero(areas.sum(axis=-1) >= _MIN_TISSUE)
        content = np.concatenate([areas, nuclei], axis=-1)[rows, columns] @ self._vectors
        content += rng.standard_normal(content.shape) * noise
        return Tiles(content, np.stack([columns, rows], axis=1))

    def composition(self, tiles: Tiles) -> NDArray[np.float64]:
        """Returns the shares of kinds `(rows, columns, kinds)` that explain the features best."""
        solved = np.linalg.lstsq(self._vectors.T, tiles.features.T, rcond=None)[0]
        columns, rows = tiles.places.T
        shares = np.zeros((rows.max() + 1, columns.max() + 1, len(NAMES)))
        shares[rows, columns] = solved[: len(NAMES)].T
        return shares

    def parts(self, kind: int, region: Region) -> NDArray[Any]:
        """Returns the polygons of a kind in a region, cut at the edges of tiles."""
        offsets = self._tiles[kind] - (region.top, region.left)
        here = ((offsets >= 0) & (offsets < (region.rows, region.columns))).all(axis=1)
        return self._parts[kind][here]

    def contact(self, one: int, other: int, region: Region) -> tuple[float, int]:
        """Measures how two kinds that occur in a region touch.

        Returns:
            Their distance in pixels, and the number of tiles of the one that touch the other.
        """
        parts, tree = self.parts(one, region), shapely.STRtree(self.parts(other, region))
        nearest = tree.query_nearest(parts, all_matches=False, return_distance=True)[1].min()
        touching = tree.query(parts, predicate="dwithin", distance=_TOUCH_PX)[0]
        return float(nearest), len(np.unique(touching))

    def draw(self, rng: np.random.Generator, held_out: bool) -> Region:
        """Draws a region with tissue on at least half of it, within one block of the slide."""
        blocks = np.argwhere(_is_held_out(self.shape) == held_out)
        while True:
            block = blocks[rng.integers(len(blocks))]
            size = rng.integers(*REGION_TILES, size=2, endpoint=True)
            corner = block * BLOCK_TILES + rng.integers(0, BLOCK_TILES - size + 1)
            (top, left), (rows, columns) = corner.tolist(), size.tolist()
            region = Region(top, left, rows, columns, int(rng.integers(4)), bool(rng.integers(2)))
            if (corner + size <= self.shape).all():
                covered = region.seen(self.areas).sum(axis=-1) >= _MIN_TISSUE
                if covered.mean() >= 0.5:
                    return region

    def questions(self, region: Region) -> list[Question]:
        """Returns the questions whose answer is clear in the region."""
        areas = region.seen(self.areas)
        total = areas.sum()
        shares = areas.sum(axis=(0, 1)) / total
        occurs, absent = shares >= _PRESENT, shares == 0
        found = [
            Question("which", _WHICH.format(NAMES[kind]), _yes(occurs[kind]))
            for kind in (TUMOUR, NECROSIS, FAT, HAEMORRHAGE)
            if occurs[kind] or absent[kind]
        ]
        for answer, (low, high) in AMOUNTS.items():
            if low <= shares[TUMOUR] <= high:
                found.append(Question("how much", _HOW_MUCH, answer))
        for kind in (NECROSIS, FAT, HAEMORRHAGE):
            quarter = _quarter(areas[..., kind]) if occurs[kind] else None
            if quarter:
                found.append(Question("where", _WHERE.format(NAMES[kind]), quarter))
        for one, other in _PAIRS:
            if not (occurs[one] and occurs[other]):
                continue
            gap, length = self.contact(one, other, region)
            if length >= _CONTACT_TILES or gap >= _APART_PX:
                text = _TOUCHES.format(NAMES[one], NAMES[other])
                found.append(Question("touches", text, _yes(gap < _APART_PX)))
            side = _side(areas[..., one], areas[..., other])
            if side:
                text = _SIDE.format(NAMES[one], NAMES[other])
                found.append(Question("which side", text, side))
        inflammatory, neoplastic = region.seen(self.in_tumour).sum(axis=(0, 1))
        if occurs[TUMOUR] and inflammatory + neoplastic >= _MIN_NUCLEI:
            share = inflammatory / (inflammatory + neoplastic)
            if not _INFLAMMATORY_SHARE[0] < share < _INFLAMMATORY_SHARE[1]:
                answer = _yes(share >= _INFLAMMATORY_SHARE[1])
                found.append(Question("infiltrated", _INFILTRATED, answer))
        return found


def read_regions(data: Path) -> tuple[RegionMap, dict[str, Region]]:
    """Reads the map and the regions of a folder that `make_data` wrote."""
    regions = json.loads((data / "regions.json").read_text())
    region_map = RegionMap.read(download(data))
    return region_map, {name: Region(**fields) for name, fields in regions.items()}


def make_data(folder: Path, seed: int, num_train: int, num_held_out: int) -> None:
    """Writes bags, `conversations.jsonl`, `held_out.jsonl` and `regions.json`.

    Args:
        folder: Output folder.
        seed: Seed of the regions.
        num_train: Number of regions for training.
        num_held_out: Number of regions for questions, in other blocks of the slide.
    """
    region_map = RegionMap.read(download(folder))
    (folder / "features").mkdir(parents=True, exist_ok=True)
    regions, asked = {}, {}
    for part, count in (("train", num_train), ("held_out", num_held_out)):
        rng = np.random.default_rng([seed, part == "held_out"])
        for number in tqdm(range(count), f"{part} regions"):
            name = f"{part}_{number:05d}"
            regions[name] = region_map.draw(rng, held_out=part == "held_out")
            asked[name] = region_map.questions(regions[name])
            region_map.features(regions[name], rng).write(folder / "features" / f"{name}.h5")
    rng = np.random.default_rng([seed, 9])
    conversations = _conversations({n: q for n, q in asked.items() if n.startswith("train")}, rng)
    held_out = _balanced({n: q for n, q in asked.items() if n.startswith("held_out")}, rng)
    for row in held_out:
        row["block"] = regions[row["slide"]].block
    write_json(folder / "regions.json", {name: asdict(r) for name, r in regions.items()})
    write_text(folder / "held_out.jsonl", "".join(json.dumps(row) + "\n" for row in held_out))
    lines = "".join(json.dumps(row) + "\n" for row in conversations)
    write_text(folder / "conversations.jsonl", lines)


def _conversations(
    asked: Mapping[str, Sequence[Question]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Asks some questions about each region, those with rare answers first of all.

    Which kinds occur is clear in every region, and whether two touch in few: drawn evenly, the
    questions about places would be the rarest.
    """
    counts = Counter((q.text, q.answer) for questions in asked.values() for q in questions)
    rows = []
    for name, questions in asked.items():
        if not questions:
            continue
        weights = np.array([1 / counts[q.text, q.answer] for q in questions])
        size = min(_ASKED, len(questions))
        turns: list[dict[str, Any]] = []
        for place in rng.choice(len(questions), size, replace=False, p=weights / weights.sum()):
            mark = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": mark + questions[place].text})
            turns.append({"from": "gpt", "value": questions[place].answer})
        rows.append({"id": name, "slide": name, "conversations": turns})
    return rows


def _balanced(
    asked: Mapping[str, Sequence[Question]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Returns questions of which every text has each answer equally often."""
    by_text: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, questions in asked.items():
        for q in questions:
            row = {"slide": name, "kind": q.kind, "question": q.text, "answer": q.answer}
            by_text.setdefault(q.text, {}).setdefault(q.answer, []).append(row)
    answers = vocabulary()
    rows = []
    for text, found in by_text.items():
        count = min(len(found.get(answer, ())) for answer in answers[text])
        for group in found.values():
            rows += [group[i] for i in rng.permutation(len(group))[:count]]
    return sorted(rows, key=lambda row: (row["slide"], row["kind"], row["question"]))


def reader_accuracy(region_map: RegionMap, noise: float, num_regions: int, seed: int) -> float:
    """Returns how many questions about contact a reader answers that knows the vectors of kinds.

    It solves for the composition of each tile and learns the answer from sums and maxima of the
    products of two kinds, on the same and on adjacent tiles: what noisy tiles let one see at best,
    approximately, whatever model reads them.

    Args:
        region_map: The map.
        noise: Standard deviation of the noise of the features.
        num_regions: Number of training regions; a third of it is held out.
        seed: Seed of regions and noise.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    rng = np.random.default_rng(seed)
    seen: dict[bool, dict[str, list[tuple[Any, str]]]] = {False: {}, True: {}}
    for held_out in (False, True):
        for _ in range(num_regions // 3 if held_out else num_regions):
            region = region_map.draw(rng, held_out)
            asked = {q.text: q.answer for q in region_map.questions(region)}
            shares = region_map.composition(region_map.features(region, rng, noise))
            for one, other in _PAIRS:
                text = _TOUCHES.format(NAMES[one], NAMES[other])
                if text in asked:
                    signs = _signs_of_contact(shares[..., one], shares[..., other])
                    seen[held_out].setdefault(text, []).append((signs, asked[text]))
    right: list[float] = []
    for text, rows in seen[True].items():
        known, answers = zip(*seen[False][text], strict=True)
        weights = [1 / answers.count(answer) for answer in answers]
        model = GradientBoostingClassifier(n_estimators=60, subsample=0.7, random_state=0)
        model.fit(known, answers, sample_weight=weights)
        told = model.predict([row[0] for row in rows])
        hits = np.array([answer == row[1] for answer, row in zip(told, rows, strict=True)])
        truth = np.array([row[1] for row in rows])
        right.append(float(np.mean([hits[truth == answer].mean() for answer in set(truth)])))
    return float(np.mean(right))


def _signs_of_contact(one: NDArray[Any], other: NDArray[Any]) -> list[float]:
    padded = np.pad(other, 1)
    rows, columns = one.shape
    around = sum(padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3))
    signs: list[float] = []
    for values in (one * other, one * around, one, other):
        ordered = np.sort(values, axis=None)[::-1]
        signs += [ordered.sum(), *ordered[:3], ordered[:8].mean()]
    return signs


def _is_held_out(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns which blocks are held out: a quarter, spread over the slide."""
    rows, columns = (-(-length // BLOCK_TILES) for length in shape)
    row, column = np.mgrid[:rows, :columns]
    return (row + 2 * column) % 4 == 0


def _cut(shape: Any, row: int, column: int, side: int) -> Iterator[tuple[int, int, Any]]:
    """Yields the parts of a polygon in the tiles of a square, as `(row, column, part)`."""
    if side == 1:
        yield row, column, shape
        return
    half = side // 2
    for top in (row, row + half):
        for left in (column, column + half):
            edges = np.array([left, top, left + half, top + half]) * TILE_PX
            part = shapely.clip_by_rect(shape, *edges.tolist())
            if part.area:
                yield from _cut(part, top, left, half)


def _quarter(areas: NDArray[np.float32]) -> str | None:
    """Returns the quarter of the rectangle with most of the area, None if that is not clear."""
    rows, columns = areas.shape
    upper, left = areas[: rows // 2], areas[:, : columns // 2]
    total = areas.sum()
    up, to_left = upper.sum() / total, left.sum() / total
    if min(abs(up - 0.5), abs(to_left - 0.5)) < _CLEARLY:
        return None
    return f"{'upper' if up > 0.5 else 'lower'} {'left' if to_left > 0.5 else 'right'}"


def _side(one: NDArray[np.float32], other: NDArray[np.float32]) -> str | None:
    """Returns on which side of the other's centroid the one's is, None if that is not clear."""
    down, right = _centroid(one) - _centroid(other)
    far, near = max(abs(down), abs(right)), min(abs(down), abs(right))
    if far < _ASIDE_TILES or far < 2 * near:
        return None
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return "right" if right > 0 else "left"


def _centroid(areas: NDArray[np.float32]) -> NDArray[np.float64]:
    places = np.indices(areas.shape).reshape(2, -1)
    return (places * areas.ravel()).sum(axis=1) / areas.sum()


def _yes(value: bool | np.bool_) -> str:
    return "yes" if value else "no"


@click.command()
@click.argument("wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--regions", default=1500, show_default=True, help="For training the reader.")
def main(wheel: Path, regions: int) -> None:
    """Print how well contact can be read from tiles of WHEEL's map by their noise."""
    region_map = RegionMap.read(wheel)
    for noise in (0.0, 0.1, 0.25, 0.5, 1.0):
        accuracy = reader_accuracy(region_map, noise, regions, seed=0)
        click.echo(f"noise {noise}: balanced accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

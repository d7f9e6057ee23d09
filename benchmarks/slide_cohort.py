"""Synthetic slides as bags of tile features, and questions about them.

A slide is a piece of tissue on a grid of tiles: stroma with round foci of other kinds. The features
of a tile are those of its kind plus noise. The answers to all questions are drawn first and the
slide afterwards, so that the answers are independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STROMA, TUMOUR, NECROSIS, FAT, LYMPH, MUCIN = range(6)
NAMES = ("stroma", "tumour", "necrosis", "fat", "lymphoid tissue", "mucin")
COLOURS = ("#f2c6d6", "#8e3a78", "#b9aab0", "#f7efd9", "#3b4f9e", "#a9cfe0")
IN_FEATURES = 32
TILE_LEVEL0_PX = 512

AMOUNTS = {"little": (0.03, 0.08), "some": (0.14, 0.21), "much": (0.29, 0.36)}
"""Share of the tissue that is tumour; the gaps keep single tiles from deciding."""

QUARTERS = ("upper left", "upper right", "lower left", "lower right")

_GLASS_TILES = 60  # side of the glass in tiles; the tissue is anywhere on it
_NOISE = 1.0
_SPREAD = 0.5  # relative to the means of the kinds: the nearest mean is right for nine of ten tiles
_APART = 3  # minimum distance in tiles of tumour and necrosis that do not touch


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what one must see to answer it."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """Facts about a slide, drawn before the slide.

    Attributes:
        present: Kinds that occur in addition to stroma and tumour.
        amount: Key of `AMOUNTS`.
        at_margin: Whether the tumour reaches the edge of the tissue.
        touches: Whether tumour and necrosis are adjacent.
        quarter: Quarter of the slide with the necrosis.
    """

    present: frozenset[int]
    amount: str
    at_margin: bool
    touches: bool
    quarter: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Answers:
        """Draws all facts; all answers are equally likely."""
        return cls(
            frozenset(kind for kind in (NECROSIS, FAT, LYMPH, MUCIN) if rng.random() < 0.5),
            str(rng.choice(list(AMOUNTS))),
            bool(rng.random() < 0.5),
            bool(rng.random() < 0.5),
            str(rng.choice(QUARTERS)),
        )

    def questions(self) -> list[Question]:
        """Returns all questions that have an answer."""
        found = [
            Question("which", f"Does the slide show {NAMES[kind]}?", _yes(kind in self.present))
            for kind in (NECROSIS, FAT, LYMPH, MUCIN)
        ]
        found.append(Question("how much", "How much of the tissue is tumour?", self.amount))
        found.append(
            Question("margin", "Does tumour reach the margin of the tissue?", _yes(self.at_margin))
        )
        if NECROSIS in self.present:
            found.append(Question("neighbours", "Does tumour touch necrosis?", _yes(self.touches)))
            found.append(Question("where", "In which quarter is the necrosis?", self.quarter))
        return found

    def report(self) -> str:
        """Returns the facts as a text, from which a language model learns the vocabulary."""
        others = [NAMES[kind] for kind in sorted(self.present)] or ["nothing else"]
        place = "at" if self.at_margin else "far from"
        text = f"Tumour: {self.amount}, {place} the margin. Also {', '.join(others)}."
        if NECROSIS in self.present:
            beside = "touches" if self.touches else "is far from"
            text += f" The necrosis is {self.quarter} and {beside} the tumour."
        return text


class Cohort:
    """Random slides with common features per kind.

    Args:
        seed: Seed of kinds and slides.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        self.means = (rng.standard_normal((len(NAMES), IN_FEATURES)) * _SPREAD).astype(np.float32)

    def write(self, folder: Path, names: Sequence[str], part: int) -> Iterator[Answers]:
        """Writes `<name>.h5` for every name and yields the facts about the slide.

        Args:
            folder: Output folder.
            names: Names of the slides.
            part: Index of the part; different parts have different slides.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            answers, kinds, rng = self.slide(part, number)
            self._write_bag(folder / f"{name}.h5", kinds, rng)
            yield answers

    def slide(
        self, part: int, number: int
    ) -> tuple[Answers, NDArray[np.int64], np.random.Generator]:
        """Returns a slide's facts, its kinds `(rows, columns)`, and the generator of its noise."""
        rng = np.random.default_rng([self.seed, 1 + part, number])
        answers = Answers.draw(rng)
        return answers, draw(answers, rng), rng

    def _write_bag(self, path: Path, kinds: NDArray[np.int64], rng: np.random.Generator) -> None:
        import h5py

        rows, columns = np.nonzero(kinds >= 0)
        noise = rng.standard_normal((len(rows), IN_FEATURES)) * _NOISE
        features = self.means[kinds[rows, columns]] + noise
        corner = rng.integers(0, _GLASS_TILES - np.array(kinds.shape[::-1]) + 1)
        coords = (np.stack([columns, rows], axis=1) + corner) * TILE_LEVEL0_PX
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=features.astype(np.float16))
            dataset = file.create_dataset("coords", data=coords.astype(np.int64))
            dataset.attrs["patch_size_level0"] = TILE_LEVEL0_PX
            file.attrs["encoder"] = "made-up"


def draw(answers: Answers, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws a slide with these facts; returns kinds `(rows, columns)`, -1 for glass."""
    while True:
        kinds = _tissue(rng)
        number = int((kinds >= 0).sum())
        tumour = round(number * rng.uniform(*AMOUNTS[answers.amount]))
        if not _add_tumour(kinds, tumour, answers, rng):
            continue
        if NECROSIS in answers.present:
            size = round(number * rng.uniform(0.06, 0.1))
            if not _add_necrosis(kinds, size, answers, rng):
                continue
        others = [kind for kind in (FAT, LYMPH, MUCIN) if kind in answers.present]
        if all(_add(kinds, kind, round(number * 0.06), rng) for kind in others):
            return kinds


def _tissue(rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws an ellipse of stroma, 12 to 24 tiles wide and high."""
    height, width = rng.integers(12, 25, 2)
    rows, columns = np.mgrid[:height, :width]
    radius = ((rows + 0.5) / height * 2 - 1) ** 2 + ((columns + 0.5) / width * 2 - 1) ** 2
    return np.where(radius <= 1, STROMA, -1)


def _add_tumour(
    kinds: NDArray[np.int64], size: int, answers: Answers, rng: np.random.Generator
) -> bool:
    depth = _distance(kinds < 0)
    for _ in range(30):
        focus = _focus(kinds, size, rng)
        if focus is None:
            return False
        nearest = depth[focus].min()
        if nearest <= 1 if answers.at_margin else nearest >= 3:
            kinds[focus] = TUMOUR
            return True
    return False


def _add_necrosis(
    kinds: NDArray[np.int64], size: int, answers: Answers, rng: np.random.Generator
) -> bool:
    far = _distance(kinds == TUMOUR)
    rows, columns = np.nonzero(kinds >= 0)
    middle = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
    extent = np.array([np.ptp(rows), np.ptp(columns)]) + 1
    for _ in range(60):
        focus = _focus(kinds, size, rng)
        if focus is None:
            return False
        offset = (np.argwhere(focus).mean(axis=0) - middle) / extent
        name = f"{'upper' if offset[0] < 0 else 'lower'} {'left' if offset[1] < 0 else 'right'}"
        is_there = name == answers.quarter and np.abs(offset).min() > 0.08
        nearest = far[focus].min()
        if is_there and (nearest <= 1 if answers.touches else nearest > _APART):
            kinds[focus] = NECROSIS
            return True
    return False


def _add(kinds: NDArray[np.int64], kind: int, size: int, rng: np.random.Generator) -> bool:
    focus = _focus(kinds, size, rng)
    if focus is None:
        return False
    kinds[focus] = kind
    return True


def _focus(
    kinds: NDArray[np.int64], size: int, rng: np.random.Generator
) -> NDArray[np.bool_] | None:
    """Returns the tiles of stroma nearest to a random one; None if there are too few."""
    rows, columns = np.nonzero(kinds == STROMA)
    if len(rows) < size or not size:
        return None
    centre = rng.integers(len(rows))
    distance = np.hypot(rows - rows[centre], columns - columns[centre])
    chosen = np.argsort(distance, kind="stable")[:size]
    focus = np.zeros(kinds.shape, bool)
    focus[rows[chosen], columns[chosen]] = True
    return focus


def _distance(target: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns the distance of every tile to the nearest target; outside the grid is glass."""
    from scipy.ndimage import distance_transform_cdt

    rows, columns = target.shape
    around = np.pad(target, 1, constant_values=bool(target[0, 0]))
    if not around.any():
        return np.full(target.shape, np.inf)
    steps = distance_transform_cdt(~around, metric="chessboard")
    return steps[1 : rows + 1, 1 : columns + 1].astype(float)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

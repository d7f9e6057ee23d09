"""The steps. Each says of every row why it is dropped, or None, whatever the other rows are."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pallava.converters.cleaning.keywords import KeywordRule
from pallava.converters.cleaning.scores import Classifier, ClipScorer
from pallava.text.encoding import IMAGE_TOKEN
from pathcore.images import ImageError, image_size, load_image

MIN_WORDS = 20
"""Captions with fewer words are dropped, as for PCaption-0.5M (PA-LLaVA, section on the data)."""

MAX_AREA_PX = 4096 * 4096
"""Larger images are dropped, as by the published dataformat.py."""


_INDEX_FIELDS = ("image", "image_path", "image_id", "id")


@dataclass(frozen=True)
class Candidate:
    """A row that is looked at.

    Attributes:
        row: As in the file.
        images: Its image files.
    """

    row: Mapping[str, Any]
    images: tuple[Path, ...]

    @property
    def text(self) -> str:
        """The caption; of a conversation, its caption if it has one, otherwise what is said."""
        if isinstance(self.row.get("caption"), str):
            return str(self.row["caption"])
        turns = self.row.get("conversations") or ()
        return " ".join(str(turn.get("value") or "").replace(IMAGE_TOKEN, "") for turn in turns)


@dataclass(frozen=True)
class Verdict:
    """Why a row goes.

    Attributes:
        reason: In words.
        unusable: The row or its image cannot be read at all, which is a fault of the data.
    """

    reason: str
    unusable: bool = False


class Step(Protocol):
    """A named step; `settings` is what its verdicts depend on, as JSON values."""

    @property
    def name(self) -> str:
        """As in reports."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the verdicts depend on."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """Says why each is dropped, or None."""


@dataclass(frozen=True)
class RowStep:
    """A step that looks at one row at a time.

    Attributes:
        name: As in reports.
        fault: Says why a candidate is dropped, or None; raises `ImageError` for a bad image.
        settings: What the verdicts depend on.
    """

    name: str
    fault: Callable[[Candidate], str | None]
    settings: Mapping[str, Any]

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """Says why each is dropped, or None."""
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict | None:
        try:
            fault = self.fault(candidate)
        except ImageError as error:
            return Verdict(str(error), unusable=True)
        return None if fault is None else Verdict(fault)


def words_step(min_words: int = MIN_WORDS) -> RowStep:
    """Drops texts of fewer words."""

    def fault(candidate: Candidate) -> str | None:
        count = len(candidate.text.split())
        return f"{count} words" if count < min_words else None

    return RowStep("words", fault, {"min_words": min_words})


def keyword_step(name: str, rule: KeywordRule) -> RowStep:
    """Drops texts that a keyword rule does not let pass."""
    settings = {key: list(getattr(rule, key)) for key in ("decisive", "keep", "ignore", "drop")}
    return RowStep(name, lambda candidate: rule.fault(candidate.text), settings)


def size_step(max_area_px: int = MAX_AREA_PX, min_side_px: int = 1) -> RowStep:
    """Drops images with a larger area or a shorter side, by their headers."""

    def fault(candidate: Candidate) -> str | None:
        for image in candidate.images:
            width_px, height_px = image_size(image)
            if width_px * height_px > max_area_px or min(width_px, height_px) < min_side_px:
                return f"{width_px} x {height_px} px"
        return None

    return RowStep("size", fault, {"max_area_px": max_area_px, "min_side_px": min_side_px})


def index_step(entries: frozenset[str]) -> RowStep:
    """Keeps the rows that a published list names; see `RowIndex`."""
    digest = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
    index = RowIndex(entries)

    def fault(candidate: Candidate) -> str | None:
        return None if index.entries_of(candidate.row) else "not in the index"

    return RowStep("index", fault, {"entries": len(entries), "sha256": digest})


class RowIndex:
    """A published list of rows, by id or by image.

    An entry names an image with or without suffix, and with more or fewer folders than the row:
    `PMC_OA/images/x.jpg`, `images/x.jpg`, `x.jpg` and `x` are the same image.

    Args:
        entries: The list.
    """

    def __init__(self, entries: frozenset[str]) -> None:
        self._entries = entries
        self._by_end: dict[str, set[str]] = {}
        for entry in entries:
            for end in _path_ends(entry):
                self._by_end.setdefault(end, set()).add(entry)

    def entries_of(self, row: Mapping[str, Any]) -> set[str]:
        """Returns the entries that name a row."""
        found = {str(row.get("id"))} & self._entries
        names = row.get("image") or []
        for name in [names] if isinstance(names, str) else names:
            path = PurePosixPath(str(name))
            found |= _path_ends(str(name)) & self._entries
            if path.name:
                for whole in (str(path), str(path.with_suffix(""))):
                    found |= self._by_end.get(whole, set())
        return found


def _path_ends(name: str) -> set[str]:
    """Returns a path and its ends, `b/c.png` and `c.png` for `a/b/c.png`, also without suffix."""
    path = PurePosixPath(name)
    ends = [PurePosixPath(*path.parts[start:]) for start in range(len(path.parts))]
    return {text for end in ends if end.name for text in (str(end), str(end.with_suffix("")))}


def read_index(path: str | os.PathLike[str]) -> frozenset[str]:
    """Reads a published list of ids or image names.

    A text file with one per line, a CSV (its column `image`, `image_path`, `image_id` or `id`;
    without such a name its first column), JSON or JSON lines: texts, or objects with one of these
    fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it names nothing.
    """
    path = Path(path)
    try:
        entries = frozenset(entry for entry in _index_entries(path) if entry)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"index {path}: cannot be read: {error}") from error
    if not entries:
        raise ValueError(f"index {path}: ids or image names expected, one for each row to keep")
    return entries


def _index_entries(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = csv.reader(file)
            head = next(rows, [])
            columns = [head.index(name) for name in _INDEX_FIELDS if name in head]
            column = columns[0] if columns else 0
            # An unknown name is a header if it is a word; ids and image names hold digits or dots.
            is_head = columns or re.fullmatch(r"[^\W\d]+", head[0] if head else "")
            for row in rows if is_head else itertools.chain([head], rows):
                yield row[column].strip() if len(row) > column else ""
        elif path.suffix == ".json":
            content = json.load(file)
            # An object holds one list for each source dataset.
            lists = content.values() if isinstance(content, Mapping) else [content]
            yield from (_entry(row) for rows in lists if isinstance(rows, list) for row in rows)
        elif path.suffix == ".jsonl":
            yield from (_entry(json.loads(line)) for line in file if line.strip())
        else:
            yield from (line.strip() for line in file)


def _entry(row: Any) -> str:
    if isinstance(row, str | int):
        return str(row)
    if isinstance(row, Mapping):
        for name in _INDEX_FIELDS:
            if isinstance(row.get(name), str | int):
                return str(row[name])
    return ""


def classifier_step(
    classifier: Classifier, labels: Sequence[str], min_probability: float = 0.5
) -> ScoreStep:
    """Keeps images to whose wanted labels a classifier gives enough probability together."""
    wanted = classifier.indices(labels)
    settings = {
        "model": classifier.identity, "labels": list(labels), "min_probability": min_probability
    }  # fmt: skip

    def scores(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [sum(row[index] for index in wanted) for row in classifier.probabilities(images)]

    return ScoreStep("classifier", scores, min_probability, classifier.batch_size, settings)


def clip_classes_step(
    scorer: ClipScorer, keep: Sequence[str], drop: Sequence[str], min_probability: float = 0.5
) -> ScoreStep:
    """Keeps images that a CLIP model puts to the descriptions `keep` rather than `drop`."""
    settings = {
        "model": scorer.identity,
        "keep": list(keep),
        "drop": list(drop),
        "min_probability": min_probability,
    }

    def scores(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        rows = scorer.class_probabilities(images, [*keep, *drop])
        return [sum(row[: len(keep)]) for row in rows]

    return ScoreStep("clip-classes", scores, min_probability, scorer.batch_size, settings)


def clip_score_step(scorer: ClipScorer, min_score: float) -> ScoreStep:
    """Keeps pairs whose image and caption have at least this cosine similarity under a CLIP."""
    settings = {"model": scorer.identity, "min_score": min_score}
    return ScoreStep("clip-score", scorer.similarities, min_score, scorer.batch_size, settings)


@dataclass(frozen=True)
class ScoreStep:
    """A step that keeps what a model scores high enough, batch by batch.

    Attributes:
        name: As in reports.
        scores: Scores of RGB images and texts.
        threshold: Rows below are dropped.
        batch_size: Images at a time.
        settings: What the verdicts depend on.
    """

    name: str
    scores: Callable[[Sequence[Any], Sequence[str]], list[float]]
    threshold: float
    batch_size: int
    settings: Mapping[str, Any]

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """Says why each is dropped, or None."""
        verdicts: list[Verdict | None] = []
        for start in range(0, len(candidates), self.batch_size):
            verdicts += self._batch(candidates[start : start + self.batch_size])
        return verdicts

    def _batch(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        verdicts: list[Verdict | None] = [None] * len(candidates)
        images, texts, places = [], [], []
        for place, candidate in enumerate(candidates):
            try:
                images.append(load_image(_only_image(candidate)))
            except ImageError as error:
                verdicts[place] = Verdict(str(error), unusable=True)
                continue
            texts.append(candidate.text)
            places.append(place)
        if images:
            for place, score in zip(places, self.scores(images, texts), strict=True):
                if not score >= self.threshold:  # NaN is no reason to keep
                    verdicts[place] = Verdict(f"score {score:.4f} below {self.threshold:g}")
        return verdicts


def _only_image(candidate: Candidate) -> Path:
    if len(candidate.images) != 1:
        raise ImageError(f"one image expected, the row has {len(candidate.images)}")
    return candidate.images[0]

"""Cleaning steps, each of which judges a row independently of the others."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pallava.converters.cleaning.keywords import KeywordRule
from pallava.converters.cleaning.scores import Classifier, ClipScorer
from pallava.text.encoding import IMAGE_TOKEN
from pathcore.files import StrPath
from pathcore.images import ImageError, image_size, load_image

MIN_WORDS = 20
"""Minimum number of words in a caption, as for PCaption-0.5M (PA-LLaVA, section on data)."""

MAX_AREA_PX = 4096 * 4096
"""Maximum area of an image, as in the published dataformat.py."""


_INDEX_FIELDS = ("image", "image_path", "image_id", "id")


@dataclass(frozen=True)
class Candidate:
    """A row under consideration.

    Attributes:
        row: Row as read from the file.
        images: Paths of its image files.
    """

    row: Mapping[str, Any]
    images: tuple[Path, ...]

    @property
    def text(self) -> str:
        """Caption of the row, or for a conversation without one, the text of its turns."""
        if isinstance(self.row.get("caption"), str):
            return str(self.row["caption"])
        turns = self.row.get("conversations") or ()
        return " ".join(str(turn.get("value") or "").replace(IMAGE_TOKEN, "") for turn in turns)


@dataclass(frozen=True)
class Verdict:
    """Reason why a row is dropped.

    Attributes:
        reason: Description of the reason.
        unusable: Whether the row or its image cannot be read, which counts as a data error.
    """

    reason: str
    unusable: bool = False


class Step(Protocol):
    """A named cleaning step."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that the verdicts depend on."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """Returns the reason why each candidate is dropped, or None to keep it."""


@dataclass(frozen=True)
class RowStep:
    """A step that judges one row at a time.

    Attributes:
        name: Name in reports.
        fault: Returns the reason to drop a candidate, or None; raises `ImageError` for a bad image.
        settings: JSON values that the verdicts depend on.
    """

    name: str
    fault: Callable[[Candidate], str | None]
    settings: Mapping[str, Any]

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """See `Step`."""
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict | None:
        try:
            fault = self.fault(candidate)
        except ImageError as error:
            return Verdict(str(error), unusable=True)
        return None if fault is None else Verdict(fault)


def words_step(min_words: int = MIN_WORDS) -> RowStep:
    """Drops texts with fewer than `min_words` words."""

    def fault(candidate: Candidate) -> str | None:
        count = len(candidate.text.split())
        return f"{count} words" if count < min_words else None

    return RowStep("words", fault, {"min_words": min_words})


def keyword_step(name: str, rule: KeywordRule) -> RowStep:
    """Drops texts that fail a keyword rule."""
    settings = {key: list(getattr(rule, key)) for key in ("decisive", "keep", "ignore", "drop")}
    return RowStep(name, lambda candidate: rule.fault(candidate.text), settings)


def size_step(max_area_px: int = MAX_AREA_PX, min_side_px: int = 1) -> RowStep:
    """Drops images with a larger area or a shorter side, according to their headers."""

    def fault(candidate: Candidate) -> str | None:
        for image in candidate.images:
            width_px, height_px = image_size(image)
            if width_px * height_px > max_area_px or min(width_px, height_px) < min_side_px:
                return f"{width_px} x {height_px} px"
        return None

    return RowStep("size", fault, {"max_area_px": max_area_px, "min_side_px": min_side_px})


def index_step(entries: frozenset[str]) -> RowStep:
    """Keeps only rows that a published list names; see `RowIndex`."""
    digest = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
    index = RowIndex(entries)

    def fault(candidate: Candidate) -> str | None:
        return None if index.entries_of(candidate.row) else "not in the index"

    return RowStep("index", fault, {"entries": len(entries), "sha256": digest})


class RowIndex:
    """A published list of rows, by id or by image.

    An entry may name an image with or without suffix and with more or fewer folders than the row:
    `PMC_OA/images/x.jpg`, `images/x.jpg`, `x.jpg` and `x` denote the same image.

    Args:
        entries: Entries of the list.
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
    """Returns all trailing sub-paths of a path (`b/c.png`, `c.png`), also without suffix."""
    path = PurePosixPath(name)
    ends = [PurePosixPath(*path.parts[start:]) for start in range(len(path.parts))]
    return {text for end in ends if end.name for text in (str(end), str(end.with_suffix("")))}


def read_index(path: StrPath) -> frozenset[str]:
    """Reads a published list of ids or image names.

    The file may be a text file with one entry per line, a CSV (column `image`, `image_path`,
    `image_id` or `id`, otherwise the first one), or JSON or JSON lines of strings or of objects
    with one of these fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has no entries.
    """
    path = Path(path)
    try:
        entries = frozenset(entry for entry in _index_entries(path) if entry)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"index {path}: cannot be read: {error}") from error
    if not entries:
        raise ValueError(f"index {path}: expected ids or image names, one for each row to keep")
    return entries


def _index_entries(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = csv.reader(file, strict=True)
            head = next(rows, [])
            columns = [head.index(name) for name in _INDEX_FIELDS if name in head]
            column = columns[0] if columns else 0
            # A single word is a header; ids and image names contain digits or dots.
            is_head = columns or re.fullmatch(r"[^\W\d]+", head[0] if head else "")
            for row in rows if is_head else itertools.chain([head], rows):
                yield row[column].strip() if len(row) > column else ""
        elif path.suffix == ".json":
            content = json.load(file)
            # An object maps source datasets to lists.
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
    """Keeps images whose total probability of the wanted labels reaches a threshold."""
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
    """Keeps images that a CLIP model assigns to descriptions of `keep` rather than `drop`."""
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
    """Keeps pairs whose image and caption reach a minimum cosine similarity in a CLIP model."""
    settings = {"model": scorer.identity, "min_score": min_score}
    return ScoreStep("clip-score", scorer.similarities, min_score, scorer.batch_size, settings)


@dataclass(frozen=True)
class ScoreStep:
    """A step that keeps rows with high enough scores, computed in batches.

    Attributes:
        name: Name in reports.
        scores: Function of RGB images and texts that returns scores.
        threshold: Minimum score.
        batch_size: Number of images per batch.
        settings: JSON values that the verdicts depend on.
    """

    name: str
    scores: Callable[[Sequence[Any], Sequence[str]], list[float]]
    threshold: float
    batch_size: int
    settings: Mapping[str, Any]

    def __call__(self, candidates: Sequence[Candidate]) -> list[Verdict | None]:
        """See `Step`."""
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
                if not score >= self.threshold:  # also drops NaN
                    verdicts[place] = Verdict(f"score {score:.4f} below {self.threshold:g}")
        return verdicts


def _only_image(candidate: Candidate) -> Path:
    if len(candidate.images) != 1:
        raise ImageError(f"expected one image, the row has {len(candidate.images)}")
    return candidate.images[0]

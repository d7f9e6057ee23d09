"""Questions about images that are stored in a folder or inside a parquet file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pallava.records.prompts import Prompt
from pallava.skipping import SkippedSample
from pathcore import images
from pathcore.files import StrPath
from pathcore.images import ImageError, decode_image, load_image
from pathcore.rows import check_fraction


class ImageSource(Protocol):
    """Image or slide that is loaded on demand."""

    @property
    def name(self) -> str:
        """Name of the image in the data, for messages."""

    def load(self) -> Image.Image:
        """Decodes the image to RGB.

        Raises:
            ImageError: If the image cannot be decoded.
        """

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Returns a string that distinguishes the content of this image from any other.

        Args:
            digest: Function that returns the content digest of a file.

        Raises:
            OSError: If the file cannot be read.
        """


@dataclass(frozen=True)
class FileImage:
    """An image file.

    Attributes:
        path: Path of the file.
        name: Name of the image in the data.
    """

    path: Path
    name: str

    def load(self) -> Image.Image:
        """See `ImageSource.load`."""
        return load_image(self.path)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """See `ImageSource.identity`; the digest of the file."""
        return digest(self.path)


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file, as Hugging Face `datasets` stores it.

    Attributes:
        path: Path of the parquet file.
        row_group: Index of the row group.
        row: Index of the row within the group.
        column: Column of `{bytes, path}` structs or of bytes.
    """

    path: Path
    row_group: int
    row: int
    column: str = "image"

    @property
    def name(self) -> str:
        """Name of the file, with row group and row."""
        return f"{self.path.name}[{self.row_group}, {self.row}]"

    def content(self) -> bytes:
        """Returns the encoded image.

        Raises:
            ImageError: If the column holds no image bytes.
        """
        value = _image_column(self.path, self.row_group, self.column)[self.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ImageError(f"{self.name}: no image bytes in column {self.column!r}")
        return content

    def load(self) -> Image.Image:
        """See `ImageSource.load`."""
        return decode_image(self.content(), name=self.name)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """See `ImageSource.identity`; the digest of the file plus the position of the row."""
        return f"{digest(self.path)}[{self.row_group}, {self.row}, {self.column}]"


@lru_cache(maxsize=2)  # consecutive questions usually share a row group
def _image_column(path: Path, row_group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(row_group, columns=[column]).column(0)


@dataclass(frozen=True)
class SlideFeatures:
    """A whole slide as a file of tile features; see `pallava.slide_bags`.

    Attributes:
        path: HDF5 file.
        name: Name of the slide in the data.
    """

    path: Path
    name: str

    def load(self) -> Image.Image:
        """Raises `ImageError`: slide models read the file themselves."""
        raise ImageError(
            f"slide {self.name}: {self.path.name} holds tile features; expected a picture for this "
            "model"
        )

    def identity(self, digest: Callable[[Path], str]) -> str:
        """See `ImageSource.identity`; the digest of the file."""
        return digest(self.path)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Id, unique within the benchmark.
        text: Question text, without the `<image>` token.
        image: Image of the question; None for a text-only question.
        answer: Reference answer; None if the data has none.
        answer_type: `yes/no`, `number`, `other`, `choice` or `class`.
        question_type: First words of the question, or the type that the data states.
        options: Option text by letter, for multiple choice.
        stem: Question without options and instructions; defaults to the text.
        prompt: Prompt in which the text words the stem; None if the data words it.
        cluster: Image, slide or patient that other questions may share. Intervals resample
            clusters. Defaults to the name of the image, or else the id.
        groups: Further groups to report, as `{"subset": "PubMed"}`.
    """

    id: str
    text: str
    image: ImageSource | None
    answer: str | None = None
    answer_type: str = "other"
    question_type: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    stem: str = ""
    prompt: Prompt | None = None
    cluster: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stem:
            object.__setattr__(self, "stem", self.text)
        if not self.cluster:
            name = self.id if self.image is None else self.image.name
            object.__setattr__(self, "cluster", name)

    def variant(self, name: str, **changes: Any) -> Question:
        """Returns a changed copy with the id `ID [NAME]`, whose text is worded again.

        Args:
            name: Name of the change, unique among the variants of a question.
            changes: New values of fields, such as `image`, `options` and `answer`, or `prompt`.

        Raises:
            ValueError: If stem or options change, but the data itself words the text.
        """
        changed = replace(self, id=f"{self.id} [{name}]", **changes)
        if changed.prompt is not None:
            text = changed.prompt.render(changed.stem, changed.options, changed.answer_type)
            return replace(changed, text=text)
        if {"stem", "options"} & changes.keys():
            raise ValueError(
                f"question {self.id!r}: its options are part of its text and cannot be changed"
            )
        return changed


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a data file, and the rows that cannot be used.

    Attributes:
        questions: Questions in file order.
        skipped: Rows that lack a question, an answer or a usable image.
        totals: Number of rows of the data by subset, if the data has subsets: the denominators
            before anything was skipped.
    """

    questions: list[Question]
    skipped: list[SkippedSample]
    totals: Mapping[str, int] = field(default_factory=dict)


class RowError(ValueError):
    """Raised for a row that cannot be used; the message names the field."""


def collect(
    source: StrPath,
    rows: Iterable[tuple[str, Any]],
    make: Callable[[str, Any], Question],
    *,
    sparse: bool = False,
    subset_of: Callable[[str], str] | None = None,
) -> QuestionSet:
    """Converts rows to questions and records those that cannot be used.

    Args:
        source: Data file, for messages.
        rows: Pairs of row id and row.
        make: Builds a question from such a pair; raises `RowError` or `ImageError` on failure.
        sparse: Whether any number of images may be absent, because the data set is published
            without them.
        subset_of: Maps a row id to its subset, for `QuestionSet.totals`.

    Raises:
        ValueError: If there are no rows, no usable rows, or more than a tenth of them cannot be
            used; absent images of sparse data do not count towards the tenth.
    """
    questions: dict[str, Question] = {}
    skipped: list[SkippedSample] = []
    totals: Counter[str] = Counter()
    total = num_absent = 0
    for row_id, row in rows:
        total += 1
        if subset_of is not None:
            totals[subset_of(row_id)] += 1
        try:
            question = make(row_id, row)
            if question.id in questions:
                raise RowError(f"question id {question.id!r} occurs twice")
            questions[question.id] = question
        except (RowError, ImageError) as error:
            skipped.append(SkippedSample(str(row_id), os.fspath(source), str(error)))
            num_absent += sparse and isinstance(error, ImageError)
    if not total:
        raise ValueError(f"{source}: holds no questions")
    faults = {str(number): f"{row.id}: {row.reason}" for number, row in enumerate(skipped)}
    num_bad = len(skipped) - (num_absent if questions else 0)
    check_fraction(num_bad, total, os.fspath(source), faults)
    return QuestionSet(list(questions.values()), skipped, dict(totals))


class NoImages:
    """Placeholder for the image folder when answers are scored, which needs no images."""


NO_IMAGES = NoImages()
ImageFolder = StrPath | NoImages


def find_image(folder: ImageFolder, name: object) -> FileImage | None:
    """Finds an image by its name in the data, which may lack the extension.

    Args:
        folder: Image folder; with `NO_IMAGES` the result is None for every name.
        name: Name in the data.

    Raises:
        ImageError: If there is no such file, or the name points outside the folder.
    """
    if isinstance(folder, NoImages):
        return None
    return FileImage(images.find_image(Path(folder), name), str(name))


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Returns the row if it is a record.

    Raises:
        RowError: If it is not.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"expected a record, found {row!r:.80}")
    return row


def text_field(row: Mapping[str, Any], *names: str) -> str:
    """Returns the first usable text among several fields of a row.

    Raises:
        RowError: If all fields are missing or empty.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            text = str(value).strip()
            if text and text.lower() != "nan":  # pandas writes missing values as nan
                return text
    raise RowError(f"{names[0]}: expected text, found {row.get(names[0])!r:.80}")

"""Questions about images, wherever the image lies: in a folder or inside a parquet file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pallava.image_index import path_inside
from pallava.rows import check_share
from pallava.skipping import SkippedSample
from pathcore.images import MAX_IMAGE_PIXELS, ImageError, load_image, to_rgb

_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class ImageSource(Protocol):
    """Where an image comes from."""

    @property
    def name(self) -> str:
        """Its name in the data, for messages."""

    def load(self) -> Image.Image:
        """Returns the image as RGB; raises `ImageError`."""

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Returns what tells this image's content from any other.

        Args:
            digest: Returns the content digest of a file.

        Raises:
            OSError: If the file cannot be read.
        """


@dataclass(frozen=True)
class FileImage:
    """An image file.

    Attributes:
        path: The file.
        name: Its name in the data.
    """

    path: Path
    name: str

    def load(self) -> Image.Image:
        """Returns the image as RGB; raises `ImageError`."""
        return load_image(self.path)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Returns the content digest of the file."""
        return digest(self.path)


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file, as Hugging Face's `datasets` stores them.

    Attributes:
        path: The parquet file.
        row_group: Row group of the image.
        row: Row inside the group.
        column: Column of `{bytes, path}` structs or of bytes.
    """

    path: Path
    row_group: int
    row: int
    column: str = "image"

    @property
    def name(self) -> str:
        """File and place."""
        return f"{self.path.name}[{self.row_group}, {self.row}]"

    def content(self) -> bytes:
        """Returns the image file's bytes; raises `ImageError`."""
        value = _image_column(self.path, self.row_group, self.column)[self.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ImageError(f"{self.name}: no image bytes in column {self.column!r}")
        return content

    def load(self) -> Image.Image:
        """Returns the image as RGB; raises `ImageError`."""
        content = self.content()
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise ImageError(f"{self.name}: {image.width} x {image.height} px is too large")
                image.load()
                return to_rgb(image, name=self.name)
        except ImageError:
            raise
        except Exception as error:  # as in load_image: decoders raise a dozen types
            raise ImageError(f"{self.name}: cannot be decoded ({error})") from error

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Returns the content digest of the parquet file, and the image's position in it."""
        return f"{digest(self.path)}[{self.row_group}, {self.row}, {self.column}]"


@lru_cache(maxsize=2)  # questions come in any order, but neighbours share a row group
def _image_column(path: Path, row_group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(row_group, columns=[column]).column(0)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Unique in the benchmark.
        text: What the model is asked, without the `<image>` mark.
        image: The image; None for a question without one.
        answer: The reference; None if the data has none.
        answer_type: `yes/no`, `number`, `other`, `choice` or `class`.
        question_type: How the question begins, or what the data calls it.
        options: Letter -> text, for multiple choice.
    """

    id: str
    text: str
    image: ImageSource | None
    answer: str | None = None
    answer_type: str = "other"
    question_type: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a data file, and the rows that cannot be asked.

    Attributes:
        questions: In the order of the file.
        skipped: Rows without a question, an answer, a readable place of an image.
    """

    questions: list[Question]
    skipped: list[SkippedSample]


class RowError(ValueError):
    """A row that cannot be used; the message names the field."""


def collect(
    source: str | os.PathLike[str],
    rows: Iterable[tuple[str, Any]],
    make: Callable[[str, Any], Question],
) -> QuestionSet:
    """Turns rows into questions; records those that cannot be.

    Args:
        source: The data file, for messages.
        rows: Pairs of a row's id and the row.
        make: Builds a question from such a pair; raises `RowError` or `ImageError`.

    Raises:
        ValueError: There are no rows, or more than a tenth cannot be used.
    """
    questions: dict[str, Question] = {}
    skipped: list[SkippedSample] = []
    total = 0
    for row_id, row in rows:
        total += 1
        try:
            question = make(row_id, row)
            if question.id in questions:
                raise RowError(f"question id {question.id!r} occurs twice")
            questions[question.id] = question
        except (RowError, ImageError) as error:
            skipped.append(SkippedSample(str(row_id), os.fspath(source), str(error)))
    if not total:
        raise ValueError(f"{source}: holds no questions")
    faults = {str(number): f"{row.id}: {row.reason}" for number, row in enumerate(skipped)}
    check_share(len(skipped), total, os.fspath(source), faults)
    return QuestionSet(list(questions.values()), skipped)


class NoImages:
    """Stands for the image folder when answers are scored, for which no image is needed."""


NO_IMAGES = NoImages()
ImageFolder = str | os.PathLike[str] | NoImages


def find_image(folder: ImageFolder, name: object) -> FileImage | None:
    """Finds an image by its name in the data, which may lack the extension.

    Args:
        folder: Where the images lie; `NO_IMAGES` gives None for every name.
        name: As in the data.

    Raises:
        ImageError: No such file, or a name that leads out of the folder.
    """
    if isinstance(folder, NoImages):
        return None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ImageError(f"image: a file name expected, got {name!r:.80}")
    path = path_inside(Path(folder), name)
    for suffix in ("", *_SUFFIXES):
        candidate = path.with_name(path.name + suffix) if suffix else path
        if candidate.is_file():
            return FileImage(candidate, name)
    raise ImageError(f"{path}: no such image file")


def text_field(row: Mapping[str, Any], *names: str) -> str:
    """Returns the first of several fields that is there, as text.

    Raises:
        RowError: None is there, or it is empty.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            text = str(value).strip()
            if text and text.lower() != "nan":  # pandas writes missing values so
                return text
    raise RowError(f"{names[0]}: text expected, got {row.get(names[0])!r:.80}")


def image_files(folder: Path) -> list[Path]:
    """Returns the image files below a folder, by name, in order.

    Hidden files are none: archives made on a Mac hold metadata named `._image.tif`.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )

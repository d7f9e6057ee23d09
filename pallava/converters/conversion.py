"""Converters' result type, and the job that writes the converted rows."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from pallava.converters.parts import PARTS_NAME, Joined, Part, run_in_parts
from pallava.records.questions import FileImage, ParquetImage, Question, RowError, find_image
from pallava.skipping import SKIP_LOG_NAME
from pallava.text.encoding import IMAGE_TOKEN, ConversationError, check_row
from pallava.text.encoding import image_files as image_names
from pathcore.files import StrPath, atomic_file, file_identity
from pathcore.images import NETWORK_FORMATS, ImageError, path_inside, relative_name
from pathcore.rows import MAX_SKIPPED_FRACTION, check_fraction, pair_fault

REPORT_NAME = "conversion.json"
IMAGES_NAME = "images"
"""Sub-folder of the output for images extracted from parquet files."""

_THREADS = 16  # checking files for existence is bound by disk or network latency
_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}

Record = tuple[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """A dataset to be converted to rows. Records are read lazily by the job.

    Attributes:
        kind: Kind of the rows, and stem of the output file.
        source: Name of the dataset, added to every row.
        licence: Licence of the dataset, added to every row; empty if the rows state it.
        records: Pairs of position and record, in an order that is the same on every run.
        make: Converts such a pair to a list of rows, which is empty if an option excludes the
            record. Raises `RowError`, `ConversationError` or `ImageError` for a record that cannot
            be used.
        image_folder: Folder that `image` in the rows is relative to; None if the images are
            `ParquetImage`s, which are written to `OUT/images`.
        files: Data files; a change of one of them starts a new job.
        options: Further inputs that the rows depend on, as JSON values.
        image_field: Field of the images; `slide` for conversations about whole slides, whose files
            in the image folder are `SLIDE.h5`.
    """

    kind: Literal["pairs", "conversations"]
    source: str
    licence: str
    records: Iterable[Record]
    make: Callable[[str, Any], Sequence[Row]]
    image_folder: Path | None
    files: Sequence[Path]
    options: Mapping[str, Any]
    image_field: Literal["image", "slide"] = "image"


def convert(
    conversion: Conversion,
    out: StrPath,
    *,
    check_images: bool = True,
    max_skipped_fraction: float = MAX_SKIPPED_FRACTION,
    part_rows: int = 10_000,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `pairs.jsonl` or `conversations.jsonl`, `skipped_samples.jsonl` and `conversion.json`.

    An interrupted job resumes when it is run again; a finished job does nothing.

    Args:
        conversion: Result of a converter.
        out: Output folder.
        check_images: Whether to check that every image file exists; rows without one are skipped.
        max_skipped_fraction: Maximum fraction of unusable records; more raise an error.
        part_rows: Number of records between two points from which a job can resume.
        progress: Called with the number of records processed.

    Returns:
        The report: `num_records`, `num_rows`, `num_excluded`, `num_skipped` and the inputs.

    Raises:
        ValueError: If there are no records, or too many cannot be used.
        FileNotFoundError: If the image folder does not exist.
        OutputExistsError: If `out` holds something else.
    """
    out = Path(out)
    if conversion.image_folder is not None and not conversion.image_folder.is_dir():
        raise FileNotFoundError(f"image folder {conversion.image_folder}: no such folder")
    name = f"{conversion.kind}.jsonl"
    what = ", ".join(map(str, conversion.files[:1])) or conversion.source
    maker = _RowMaker(conversion, out / IMAGES_NAME, check_images)

    def handle(batch: Sequence[Record]) -> Part:
        part = _make_part(batch, maker, name, what)
        if part.counts["skipped"] == len(batch) and not _has_parts(out):
            check_fraction(len(batch), len(batch), what, _numbered(part.notes))
        return part

    def report(joined: Joined, folder: Path) -> dict[str, Any]:
        counts = joined.counts
        if not counts["records"]:
            raise ValueError(f"{what}: holds no records")
        faults = _numbered([fault for notes in joined.notes for fault in notes])
        check_fraction(
            counts["skipped"], counts["records"], what, faults, max_fraction=max_skipped_fraction
        )
        images = conversion.image_folder or out / IMAGES_NAME
        return {
            "kind": conversion.kind,
            "source": conversion.source,
            "licence": conversion.licence,
            "image_folder": str(images.absolute()),
            **{f"num_{key}": counts[key] for key in ("records", "rows", "excluded", "skipped")},
        }

    inputs = {
        "kind": conversion.kind,
        "source": conversion.source,
        "licence": conversion.licence,
        "files": [file_identity(path) for path in conversion.files],
        "image_folder": str(conversion.image_folder and conversion.image_folder.absolute()),
        "check_images": check_images,
        "options": dict(conversion.options),
    }
    result = run_in_parts(
        conversion.records,
        handle,
        out,
        inputs=inputs,
        report_name=REPORT_NAME,
        names=(name, SKIP_LOG_NAME),
        report=report,
        part_rows=part_rows,
        progress=progress,
    )
    assert result is not None
    return result


def conversation(question: str, answer: str, num_images: int = 1) -> list[dict[str, str]]:
    """Builds LLaVA turns for one question and its answer, with the images in front."""
    marks = "".join(f"{IMAGE_TOKEN}\n" for _ in range(num_images))
    question = question.replace(IMAGE_TOKEN, "").strip()
    return [
        {"from": "human", "value": marks + question},
        {"from": "gpt", "value": answer.strip()},
    ]


def llava_turns(row: Mapping[str, Any], num_images: int) -> list[dict[str, str]]:
    """Returns the turns of a LLaVA row with its image tokens in front of the first question.

    Published sets have them in front, at the end, or not at all.

    Raises:
        RowError: If the row holds no turns.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise RowError("conversations: expected a list of {from, value}")
    marks = "".join(f"{IMAGE_TOKEN}\n" for _ in range(num_images))
    found = []
    for turn in turns:
        role, text = str(turn.get("from")), str(turn["value"]).replace(IMAGE_TOKEN, "").strip()
        if role == "human" and marks:
            text, marks = marks + text, ""
        found.append({"from": role, "value": text})
    return found


def question_row(question: Question, folder: Path | None, answer: str | None = None) -> Row:
    """Converts a benchmark question to a conversation row without an id.

    Args:
        question: Question, as returned by the readers of `pallava.records`.
        folder: Image folder; None for images in parquet files.
        answer: Answer to use instead of the reference.
    """
    answer = answer if answer is not None else question.answer
    if answer is None:
        raise RowError("no answer")
    image: str | ParquetImage
    if isinstance(question.image, FileImage):
        assert folder is not None
        image = relative_name(folder, question.image.path)
    elif isinstance(question.image, ParquetImage):
        image = question.image
    else:
        return {"conversations": conversation(question.text, answer, 0)}
    return {"image": image, "conversations": conversation(question.text, answer)}


def chosen(text: str) -> frozenset[str]:
    """Splits a comma-separated option into lowercased names; an empty set means all."""
    return frozenset(name.strip().lower() for name in text.split(",") if name.strip())


class _RowMaker:
    """Converts a record to finished rows: adds provenance, locates images, validates."""

    def __init__(self, conversion: Conversion, image_out: Path, check_images: bool) -> None:
        self.conversion = conversion
        self.image_out = image_out
        self.check_images = check_images

    def __call__(self, record: Record) -> list[Row] | str:
        """Returns the rows, or the reason why there are none."""
        where, content = record
        try:
            return [self._finish(row) for row in self.conversion.make(where, content)]
        except (RowError, ConversationError, ImageError) as error:
            return str(error)

    def _finish(self, row: Row) -> Row:
        row = dict(row)
        if isinstance(row.get("image"), ParquetImage):
            row["image"] = save_image(row["image"].content(), self.image_out)
        elif row.get("slide") and self.check_images and self.conversion.image_field == "slide":
            self._check_slides(image_names(row, "slide"))
        elif row.get("image"):
            names = [self._found(name) for name in image_names(row)]
            row["image"] = names[0] if isinstance(row["image"], str) else names
        row.setdefault("source", self.conversion.source)
        if self.conversion.licence:
            row.setdefault("licence", self.conversion.licence)
        is_pair, field = self.conversion.kind == "pairs", self.conversion.image_field
        fault = pair_fault(row) if is_pair else check_row(row, field)
        if fault:
            raise RowError(fault)
        return row

    def _check_slides(self, names: Sequence[str]) -> None:
        assert self.conversion.image_folder is not None
        for name in names:
            file = path_inside(self.conversion.image_folder, f"{name}.h5")
            if not os.path.isfile(file):  # False, too, for a name that is too long
                raise ImageError(f"slide {name}: no {name}.h5 in {self.conversion.image_folder}")

    def _found(self, name: str) -> str:
        folder = self.conversion.image_folder
        assert folder is not None, "rows name image files, but the conversion has no image_folder"
        if not self.check_images:
            return relative_name(folder, path_inside(folder, name))
        image = find_image(folder, name)
        assert image is not None
        return relative_name(folder, image.path)


def save_image(content: bytes, folder: Path) -> str:
    """Writes an encoded image under the digest of its content, unless it already exists.

    Returns:
        The name of the file.

    Raises:
        ImageError: If the content is not an image of a known format.
    """
    try:
        with Image.open(io.BytesIO(content), formats=NETWORK_FORMATS) as image:
            kind = str(image.format)
    except Exception as error:  # decoders raise a dozen exception types
        raise ImageError(f"no image of the formats {', '.join(NETWORK_FORMATS)}") from error
    name = hashlib.sha256(content).hexdigest()[:32] + _SUFFIXES.get(kind, f".{kind.lower()}")
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / name) as partial:
            partial.write_bytes(content)
    return name


def _make_part(batch: Sequence[Record], maker: _RowMaker, name: str, what: str) -> Part:
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    counts: Counter[str] = Counter(records=len(batch))
    for (where, _), made in zip(batch, _map(maker, batch), strict=True):
        if isinstance(made, str):
            skipped.append({"id": where, "file": what, "reason": _printable(made)})
        elif not made:
            counts["excluded"] += 1
        else:
            rows += made
    counts.update(rows=len(rows), skipped=len(skipped))
    notes = [f"{row['id']}: {row['reason']}" for row in skipped[:3]]
    return Part({name: rows, SKIP_LOG_NAME: skipped}, counts, notes)


def _map(maker: _RowMaker, batch: Sequence[Record]) -> Iterator[list[Row] | str]:
    if maker.conversion.image_folder is None:  # neighbours share a cached row group
        yield from map(maker, batch)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(maker, batch)


def _has_parts(out: Path) -> bool:
    return any((out / PARTS_NAME).glob("0*.jsonl"))


def _numbered(faults: Sequence[str]) -> dict[str, str]:
    return {str(number): fault for number, fault in enumerate(faults)}


def _printable(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode()

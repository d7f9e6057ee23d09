"""Labelled images and the original's question lists, as questions for zero-shot classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallava.records.containers import image_root, read_records
from pallava.records.questions import (
    FileImage,
    ImageFolder,
    Question,
    QuestionSet,
    RowError,
    as_mapping,
    collect,
    find_image,
    text_field,
)
from pathcore import image_sets
from pathcore.files import StrPath
from pathcore.image_sets import ImageSet


def read_class_folders(data_path: StrPath, class_set: ImageSet) -> QuestionSet:
    """Builds one question per image of every class.

    Raises:
        FileNotFoundError: If the folder does not exist, or a class has no images.
        ValueError: If more than a tenth of a table's rows cannot be used.
    """
    # Tables are often split, so that a class may be absent; globs without a match are a mistake.
    is_table = class_set.layout["kind"] == "table"
    found = image_sets.read_images(class_set, data_path, all_classes=not is_table)
    images = zip(found.images, found.labels, strict=True)
    rows = [(image.id, (image, class_set.names[label])) for image, label in images]

    def make(row_id: str, row: Any) -> Question:
        if isinstance(row, str):
            raise RowError(row)
        image, name = row
        if not isinstance(image, image_sets.FileImage):
            raise RowError("images in HDF5 files are for CLIPs only")
        source = FileImage(image.path, row_id)
        return Question(row_id, class_set.question, source, name, "class", class_set.name)

    skipped = [(row["id"], row["reason"]) for row in found.skipped]
    source = Path(data_path) / class_set.layout["file"] if is_table else data_path
    return collect(source, [*rows, *skipped], make)


def read_class_records(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    class_set: ImageSet | None,
    labels_path: StrPath | None = None,
) -> QuestionSet:
    """Reads the original format `id -> {question, image}`, with labels in the record or in a file.

    Args:
        data_path: JSON or JSON lines file.
        image_folder: Image folder.
        class_set: Config that names the classes of numeric labels, which count from 0.
        labels_path: JSON file with an object `id -> class name or number`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If more than a tenth of the rows cannot be used.
    """
    folder = image_folder or image_root(None, Path(data_path), ("images",))
    labels = dict(read_records(labels_path)) if labels_path else {}

    def make(row_id: str, row: Any) -> Question:
        row = as_mapping(row)
        label = labels.get(row_id, row.get("answer"))
        return Question(
            id=row_id,
            text=text_field(row, "question"),
            image=find_image(folder, row.get("image")),
            answer=None if label is None else _class_name(label, class_set),
            answer_type="class",
            question_type=class_set.name if class_set else "",
        )

    return collect(data_path, read_records(data_path), make)


def _class_name(label: object, class_set: ImageSet | None) -> str:
    if class_set is None or label in class_set.names:
        return str(label)
    if isinstance(label, int) and 0 <= label < len(class_set.classes):
        return class_set.names[label]
    if class_set.layout["kind"] == "table" and str(label).lower() in class_set.by_label:
        return class_set.names[class_set.by_label[str(label).lower()]]
    raise RowError(f"label {label!r} is none of the classes {', '.join(class_set.names)}")

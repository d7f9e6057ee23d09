"""Zero-shot classification of images that a small config assigns to classes.

A config is YAML or JSON::

    name: oscc
    question: Is this normal oral epithelium or oral squamous cell carcinoma?
    classes:
      - name: Normal
        folders: ["*Normal*"]            # globs below --data-path, searched recursively
        wordings: [normal oral epithelium, normal]
      - name: OSCC
        folders: ["*OSCC*"]
        wordings: [oral squamous cell carcinoma, OSCC]

Instead of `folders`, a table can assign images to classes::

    table: {file: labels.csv, image: img_id, label: tumor}
    classes:
      - {name: tumour, label: "1", wordings: [tumour, tumor]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pallava.records.containers import image_root, read_csv, read_records
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
from pathcore.files import StrPath
from pathcore.images import image_files

_PACKAGE = "pallava.records.class_sets"


@dataclass(frozen=True)
class ImageClass:
    """One class.

    Attributes:
        name: Name in reports.
        wordings: Texts that denote the class in an answer; its name is added.
        folders: Globs of the class's folders below the data folder.
        label: Value of the class in a table of labels.
    """

    name: str
    wordings: tuple[str, ...]
    folders: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class ClassSet:
    """A classification benchmark.

    Attributes:
        name: Name in reports.
        question: Question asked about every image.
        classes: Classes in report order.
        table: `file`, `image` and `label`: a CSV file and two of its columns; empty for folders.
    """

    name: str
    question: str
    classes: tuple[ImageClass, ...]
    table: Mapping[str, str] = field(default_factory=dict)

    @property
    def wordings(self) -> dict[str, tuple[str, ...]]:
        """Texts that denote each class, by class name."""
        return {item.name: item.wordings for item in self.classes}

    @property
    def names(self) -> list[str]:
        """Class names in report order."""
        return [item.name for item in self.classes]


def class_set_names() -> list[str]:
    """Returns the names of the configs shipped with the package."""
    files = resources.files(_PACKAGE).iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".json"))


def load_class_set(name_or_file: StrPath) -> ClassSet:
    """Loads a config from a file, or a shipped config by name.

    Raises:
        FileNotFoundError: If the argument is neither a file nor a known name.
        ValueError: If the config is invalid; the message names the field.
    """
    path = Path(name_or_file)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(name_or_file) in class_set_names():
        text = (resources.files(_PACKAGE) / f"{name_or_file}.json").read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(
            f"class config {name_or_file}: neither a file nor one of {', '.join(class_set_names())}"
        )
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"class config {name_or_file}: cannot be read: {error}") from error
    try:
        return _class_set(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"class config {name_or_file}: name, question and classes with name expected; "
            f"{type(error).__name__}: {error}"
        ) from error


def read_class_folders(data_path: StrPath, class_set: ClassSet) -> QuestionSet:
    """Builds one question per image of every class.

    Raises:
        FileNotFoundError: If the folder does not exist, or a class has no images.
        ValueError: If more than a tenth of a table's rows cannot be used.
    """
    folder = Path(data_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    if class_set.table:
        table = folder / class_set.table["file"]
        by_label = {item.label: item.name for item in class_set.classes}
        return collect(
            table, read_csv(table), lambda _, row: _from_table(row, folder, class_set, by_label)
        )
    pairs = [(path, item.name) for item in class_set.classes for path in _class_files(folder, item)]
    rows = [(path.relative_to(folder).as_posix(), (path, name)) for path, name in pairs]

    def make(row_id: str, row: tuple[Path, str]) -> Question:
        image = FileImage(row[0], row_id)
        return Question(row_id, class_set.question, image, row[1], "class", class_set.name)

    return collect(folder, rows, make)


def read_class_records(
    data_path: StrPath,
    image_folder: ImageFolder | None,
    class_set: ClassSet | None,
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


def _class_name(label: object, class_set: ClassSet | None) -> str:
    if class_set is None or label in class_set.names:
        return str(label)
    if isinstance(label, int) and 0 <= label < len(class_set.classes):
        return class_set.names[label]
    by_label = {item.label: item.name for item in class_set.classes if item.label}
    if str(label) in by_label:
        return by_label[str(label)]
    raise RowError(f"label {label!r} is none of the classes {', '.join(class_set.names)}")


def _from_table(
    row: Any, folder: Path, class_set: ClassSet, by_label: Mapping[str, str]
) -> Question:
    if not isinstance(row, Mapping):
        raise RowError(str(row))
    name = text_field(row, class_set.table["image"])
    label = text_field(row, class_set.table["label"])
    if label not in by_label:
        raise RowError(f"label {label!r} is none of {', '.join(by_label)}")
    image = find_image(folder / class_set.table.get("folder", ""), name)
    return Question(name, class_set.question, image, by_label[label], "class", class_set.name)


def _class_files(folder: Path, item: ImageClass) -> Iterator[Path]:
    found: set[Path] = set()
    for pattern in item.folders:
        for match in folder.glob(pattern):
            if not match.name.startswith("."):
                found.update(image_files(match) if match.is_dir() else [match])
    if not found:
        raise FileNotFoundError(
            f"{folder}: no images of class {item.name!r} below {', '.join(item.folders)}; adapt "
            "`folders` in the class config"
        )
    yield from sorted(found)


def _class_set(content: Mapping[str, Any]) -> ClassSet:
    classes = tuple(
        ImageClass(
            name=str(item["name"]),
            wordings=tuple(dict.fromkeys([*map(str, item.get("wordings", ())), str(item["name"])])),
            folders=tuple(map(str, item.get("folders", [str(item["name"])]))),
            label=str(item.get("label", "")),
        )
        for item in content["classes"]
    )
    if len(classes) < 2 or len({item.name for item in classes}) != len(classes):
        raise ValueError("class config: at least two classes of different names expected")
    table = {str(key): str(value) for key, value in (content.get("table") or {}).items()}
    if table and not {"file", "image", "label"} <= set(table):
        raise ValueError("class config: table needs file, image and label")
    return ClassSet(str(content["name"]), str(content["question"]), classes, table)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error

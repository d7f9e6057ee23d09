"""Labelled images as public data sets lay them out, described by a small config.

A config is JSON or YAML::

    name: crc100k
    layout: {kind: folders}
    splits: {train: {where: {Partition: train}}}      # what differs in the layout; optional
    question: Which tissue does the image show?       # to ask a language model
    templates: ["an H&E image of {}"]                 # for a CLIP; optional
    classes:
      - name: ADI
        folders: ["*/ADI"]
        wordings: [adipose tissue, fat]               # texts that denote the class in an answer
        prompts: [adipose tissue, fat cells]          # texts that replace {} in the templates

Layouts:
  `folders`     each class has `folders`: globs below the data folder, of folders or of images.
  `table`       `file` (CSV or Excel), `image` and `label` columns, or `one_hot` with a column per
                class; `where: {column: value}` keeps rows, `drop` skips labels; `folder` holds the
                images, also in subfolders; each class has `labels`.
  `file_names`  `images` is a glob, `pattern` a regular expression with a group `label`.
  `hdf5`        `images` and `labels`: `{file, dataset}`, as PatchCamelyon is published.

`table: {...}` is short for a layout of kind `table`, and `label` for `labels` with one element.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from pathcore.files import StrPath, file_identity
from pathcore.images import (
    IMAGE_SUFFIXES,
    ImageError,
    find_image,
    image_files,
    load_image,
    path_inside,
)
from pathcore.rgb import to_rgb
from pathcore.rows import read_csv

Use = Literal["question", "prompts", "labels"]
"""What a config is used for; `labels` needs neither a question nor prompts."""

TEMPLATES = (
    "a histology image of {}.",
    "an H&E stained section showing {}.",
    "a microscopic view of {}.",
    "this patch contains {}.",
    "{} under the microscope.",
)
"""Templates of a config that has none."""

_PACKAGE = "pathcore.image_set_presets"
_FIELDS: dict[str, set[str]] = {
    "folders": set(),
    "table": {"file", "image"},
    "file_names": {"images", "pattern"},
    "hdf5": {"images", "labels"},
}
_ONE = {"1", "1.0"}


@dataclass(frozen=True)
class FileImage:
    """An image file, with its name in the data as `id`."""

    id: str
    path: Path

    def identity(self) -> list[Any]:
        """Returns path, size and modification time; raises OSError if there is no such file."""
        return file_identity(self.path)

    def open(self) -> Image.Image:
        """Returns it in RGB."""
        return load_image(self.path)


@dataclass(frozen=True)
class HDF5Image:
    """A row of a dataset `(N, height, width, 3)` of an HDF5 file."""

    id: str
    path: Path
    dataset: str
    row: int

    def identity(self) -> list[Any]:
        """Returns path, size and modification time of the file, dataset and row."""
        return [*file_identity(self.path), self.dataset, self.row]

    def open(self) -> Image.Image:
        """Returns it in RGB; the file is reopened each time, so that processes do not share it."""
        import h5py

        with h5py.File(self.path, "r") as file:
            pixels = file[self.dataset][self.row]
        try:
            image = Image.fromarray(pixels)
        except TypeError as error:
            raise ImageError(
                f"{self.id}: pixels {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3)"
            ) from error
        return to_rgb(image, name=self.id)


@dataclass(frozen=True)
class LabelledImages:
    """The images of a set.

    Attributes:
        images: Images in a fixed order.
        labels: Index of each image's class.
        skipped: `id` and `reason` of rows that cannot be used.
    """

    images: tuple[FileImage | HDF5Image, ...]
    labels: tuple[int, ...]
    skipped: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class ImageClass:
    """One class.

    Attributes:
        name: Name in reports.
        keys: Globs of its folders, or its labels.
        wordings: Texts that denote the class in an answer, its name among them.
        prompts: Texts that fill in the class in the templates.
    """

    name: str
    keys: tuple[str, ...]
    wordings: tuple[str, ...]
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images.

    Attributes:
        name: Name in reports.
        classes: Classes in report order.
        layout: How the images and their labels are stored.
        question: Question asked about every image.
        templates: Sentences with `{}` for a prompt.
        splits: Fields of the layout that differ in other splits, by split; the layout itself is
            that of the test images.
    """

    name: str
    classes: tuple[ImageClass, ...]
    layout: Mapping[str, Any]
    question: str = ""
    templates: tuple[str, ...] = TEMPLATES
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def split(self, name: str) -> ImageSet:
        """Returns the set with the layout of another split."""
        return replace(self, layout={**self.layout, **self.splits[name]})

    @property
    def names(self) -> list[str]:
        """Class names in report order."""
        return [item.name for item in self.classes]

    @property
    def wordings(self) -> dict[str, tuple[str, ...]]:
        """Texts that denote each class, by class name."""
        return {item.name: item.wordings for item in self.classes}

    @property
    def by_label(self) -> dict[str, int]:
        """Index of the class by label, in lower case."""
        return {key.lower(): i for i, item in enumerate(self.classes) for key in item.keys}

    def sentences(self, index: int) -> list[str]:
        """Returns every template with every prompt of a class."""
        return [t.replace("{}", p) for t in self.templates for p in self.classes[index].prompts]


def image_set_names(use: Use) -> list[str]:
    """Returns the names of the shipped configs that have a question, or prompts, or all names."""
    names = []
    for file in resources.files(_PACKAGE).iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if use == "labels" or use in content or use in content["classes"][0]:
                names.append(file.name.removesuffix(".json"))
    return sorted(names)


def load_image_set(name_or_file: StrPath, use: Use) -> ImageSet:
    """Loads a config from a file, or a shipped config by name.

    Args:
        name_or_file: File or name.
        use: What the config must have: a question, or prompts of every class.

    Raises:
        FileNotFoundError: If the argument is neither a file nor a known name.
        ValueError: If the config is invalid; the message names the field.
    """
    path = Path(name_or_file)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(name_or_file) in (known := image_set_names(use)):
        text = (resources.files(_PACKAGE) / f"{name_or_file}.json").read_text(encoding="utf-8")
        path = Path(f"{name_or_file}.json")
    else:
        raise FileNotFoundError(
            f"image set {name_or_file}: neither a file nor one of {', '.join(known)}"
        )
    try:
        return _image_set(json.loads(text) if path.suffix == ".json" else _yaml(text), use)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"image set {name_or_file}: {type(error).__name__}: {error}") from error


def read_images(
    image_set: ImageSet, data_path: StrPath, *, all_classes: bool = True
) -> LabelledImages:
    """Finds the images of a set and their classes.

    Args:
        image_set: The set.
        data_path: Folder of the data.
        all_classes: Whether every class must have images.

    Raises:
        FileNotFoundError: If there is no such folder or table, or a class has no images.
        ValueError: If the data do not follow the layout.
    """
    folder = Path(data_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images of {image_set.name}")
    readers = {
        "folders": _images_of_folders,
        "table": _images_of_table,
        "file_names": _file_names,
        "hdf5": _hdf5,
    }
    found = readers[image_set.layout["kind"]](image_set, folder)
    missing = [repr(n) for i, n in enumerate(image_set.names) if i not in set(found.labels)]
    if missing and all_classes:
        raise FileNotFoundError(
            f"{folder}: no images of {', '.join(missing)} of {image_set.name}, laid out as "
            f"{json.dumps(dict(image_set.layout))}; copy the config and adapt it"
            + (f"; the first skipped row: {found.skipped[0]}" if found.skipped else "")
        )
    return found


def _images_of_folders(image_set: ImageSet, folder: Path) -> LabelledImages:
    images, labels = [], []
    owners: dict[Path, int] = {}
    for index, item in enumerate(image_set.classes):
        paths: set[Path] = set()
        for pattern in item.keys:
            for match in folder.glob(pattern):
                if not match.name.startswith("."):
                    paths.update(image_files(match) if match.is_dir() else [match])
        for path in sorted(paths):
            if (first := owners.setdefault(path, index)) != index:
                names = f"{image_set.names[first]!r} and of {item.name!r}"
                raise ValueError(f"{path}: in folders of {names}; a class has its own folders")
            images.append(FileImage(path.relative_to(folder).as_posix(), path))
            labels.append(index)
    return LabelledImages(tuple(images), tuple(labels))


def _images_of_table(image_set: ImageSet, folder: Path) -> LabelledImages:
    layout, by_label = image_set.layout, image_set.by_label
    where, drop = layout.get("where", {}), {label.lower() for label in layout.get("drop", ())}
    root = folder / layout.get("folder", "")
    ones = [item.keys for item in image_set.classes] if "one_hot" in layout else None
    needed = [layout["image"], *where, *([keys[0] for keys in ones] if ones else [layout["label"]])]
    rows = list(_rows(folder / layout["file"]))
    other_spelling: Callable[[str], Path | None] | None = None
    images, labels, skipped = [], [], []
    lines: dict[Path, tuple[int, int]] = {}
    contradicted: set[Path] = set()  # images of two classes, which are left out
    for number, row in rows:
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{folder / layout['file']}: no columns {absent}, only {sorted(row)}")
        if any(row[column] != str(value) for column, value in where.items()):
            continue
        name = row[layout["image"]] or ""
        try:
            if None in row.values():
                raise ValueError("another number of columns than the header")
            if ones:
                found = [i for i, keys in enumerate(ones) if {row.get(k) for k in keys} & _ONE]
            else:
                label = row[layout["label"]].lower()
                if label in drop and label not in by_label:
                    continue
                found = [by_label[label]] if label in by_label else []
            if len(found) != 1:
                label = "" if ones else f"label {row[layout['label']]!r} "
                raise ValueError(f"{label}belongs to {len(found)} classes, expected one")
            try:
                path = find_image(root, name)
            except ImageError:
                path_inside(root, name)  # names that point outside stay refused
                if other_spelling is None:
                    names = [row.get(layout["image"]) or "" for _, row in rows]
                    other_spelling = _other_spellings(root, names)
                if (spelled := other_spelling(name)) is None:
                    raise
                path = spelled
        except ValueError as error:
            skipped.append({"id": name or f"row {number}", "reason": str(error)})
            continue
        first, own = lines.setdefault(path, (number, found[0]))
        if first != number:
            reason = f"row {number}: named twice, first in row {first}"
            if own != found[0]:
                reason += f", as {image_set.names[own]!r} instead of {image_set.names[found[0]]!r}"
                contradicted.add(path)
            skipped.append({"id": name, "reason": reason})
            continue
        images.append(FileImage(name, path))
        labels.append(found[0])
    kept = [index for index, image in enumerate(images) if image.path not in contradicted]
    return LabelledImages(
        tuple(images[index] for index in kept),
        tuple(labels[index] for index in kept),
        tuple(skipped),
    )


def _file_names(image_set: ImageSet, folder: Path) -> LabelledImages:
    pattern, by_label = re.compile(image_set.layout["pattern"]), image_set.by_label
    drop = set(map(str, image_set.layout.get("drop", ())))
    images, labels, skipped = [], [], []
    for path in sorted(folder.glob(image_set.layout["images"])):
        name = path.relative_to(folder).as_posix()
        match = pattern.search(path.name)
        label = re.sub(r"\W+", "_", match["label"]).strip("_") if match else ""
        if label.lower() in by_label:
            images.append(FileImage(name, path))
            labels.append(by_label[label.lower()])
        elif label not in drop:
            skipped.append({"id": name, "reason": f"label {label!r} belongs to no class"})
    return LabelledImages(tuple(images), tuple(labels), tuple(skipped))


def _hdf5(image_set: ImageSet, folder: Path) -> LabelledImages:
    import h5py

    sizes = []
    for part in ("images", "labels"):
        file = folder / image_set.layout[part]["file"]
        if not file.is_file():
            packed = file.with_name(f"{file.name}.gz")
            hint = "; unpack it: gunzip" if packed.is_file() else ""
            raise FileNotFoundError(f"{file}: no such file{hint}")
        with h5py.File(file, "r") as content:
            name = image_set.layout[part]["dataset"]
            if name not in content:
                raise ValueError(f"{file}: no dataset {name!r}, only {sorted(content)}")
            sizes.append(len(content[name]))
            values = content[name][:].reshape(-1).tolist() if part == "labels" else []
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder}: {sizes[0]} images, {sizes[1]} labels")
    path = folder / image_set.layout["images"]["file"]
    name, by_label = image_set.layout["images"]["dataset"], image_set.by_label
    if unknown := {str(value) for value in values} - set(by_label):
        raise ValueError(f"{folder}: labels {sorted(unknown)} belong to no class")
    images = tuple(HDF5Image(f"{path.name}:{row}", path, name, row) for row in range(sizes[0]))
    return LabelledImages(images, tuple(by_label[str(value)] for value in values))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and row; a value is None where the row has too few or too many fields."""
    if table.suffix not in (".xlsx", ".xls"):
        rows: Any = read_csv(table)
    elif not table.is_file():
        raise FileNotFoundError(f"table {table}: no such file")
    else:
        import pandas as pd

        try:
            frame = pd.read_excel(table, dtype=str, keep_default_na=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"{table}: cannot be read: {error}") from error
        rows = enumerate(frame.to_dict("records"), start=2)
    for number, row in rows:
        yield (
            number,
            {
                str(column).strip(): value.strip() if isinstance(value, str) else None
                for column, value in row.items()
            },
        )


def _other_spellings(root: Path, names: Sequence[str]) -> Callable[[str], Path | None]:
    """Returns a function that finds the image of a name that the table spells otherwise.

    Published tables have other blanks, dashes and suffixes than the files. A file is taken only if
    no other file and no other name of the table are spelled alike.
    """

    def plain(name: str) -> str:
        # Where words end counts: 1_01 and 10_1 are two images.
        file = Path(name)
        stem = file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name
        return re.sub(r"[\W_]+", "-", stem).strip("-").lower()

    files: dict[str, list[Path]] = {}
    for path in image_files(root):
        files.setdefault(plain(path.name), []).append(path)
    rows = Counter(plain(name) for name in set(names))

    def find(name: str) -> Path | None:
        found = files.get(plain(name), [])
        return found[0] if len(found) == 1 and rows[plain(name)] == 1 else None

    return find


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _texts(content: Mapping[str, Any], name: str, default: Sequence[Any] = ()) -> tuple[str, ...]:
    """Returns a list of texts; a text alone would be read as its letters."""
    found = content.get(name, default)
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"{name}: expected a list, found {found!r}")
    return tuple(map(str, found))


def _image_set(content: Mapping[str, Any], use: Use) -> ImageSet:
    default = {"kind": "table", **content["table"]} if content.get("table") else {"kind": "folders"}
    layout = dict(content.get("layout", default))
    kind = layout.get("kind")
    if kind not in _FIELDS or (lacking := _FIELDS[kind] - set(layout)):
        lacks = f"; it lacks {sorted(lacking)}" if kind in _FIELDS else ""
        raise ValueError(f"layout of kind {kind!r}: expected one of {sorted(_FIELDS)}{lacks}")
    if kind == "table" and not {"label", "one_hot"} & set(layout):
        raise ValueError("layout of kind 'table': label or one_hot expected")
    layout |= {"drop": _texts(layout, "drop")} if "drop" in layout else {}
    templates = _texts(content, "templates", TEMPLATES)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError("templates: expected sentences with one {} each")
    classes = []
    for row in content["classes"]:
        name = str(row["name"])
        label = row.get("label", name)
        keys = ("folders", [name]) if kind == "folders" else ("labels", [label])
        wordings = dict.fromkeys([*_texts(row, "wordings"), name])
        prompts = _texts(row, "prompts")
        if use == "prompts" and not prompts:
            raise ValueError(f"class {name!r}: prompts: expected a list of texts, found none")
        classes.append(ImageClass(name, _texts(row, *keys), tuple(wordings), prompts))
    names = [item.name for item in classes]
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"classes: expected at least two, of different names; found {names}")
    # Labels are compared in lower case; globs and columns are not.
    exact = kind == "folders" or "one_hot" in layout
    owners: dict[str, str] = {}
    for item in classes:
        for key in item.keys:
            if (first := owners.setdefault(key if exact else key.lower(), item.name)) != item.name:
                raise ValueError(f"classes: {key!r} denotes both {first!r} and {item.name!r}")
    question = content["question"] if use == "question" else content.get("question", "")
    splits = content.get("splits", {})
    if not all(isinstance(changes, Mapping) for changes in splits.values()):
        raise ValueError(f"splits: expected fields of the layout by split, found {splits}")
    return ImageSet(str(content["name"]), tuple(classes), layout, str(question), templates, splits)

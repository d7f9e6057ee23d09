"""Labelled images as public data sets lay them out, described by a small config.

A config is JSON or YAML::

    name: crc100k
    layout: {kind: folders}
    templates: ["an H&E image of {}"]
    classes:
      - {name: ADI, folders: ["*/ADI"], prompts: [adipose tissue, fat cells]}

Layouts:
  `folders`     each class has `folders`: globs below the data folder, or of the images themselves.
  `table`       `file` (CSV or Excel), `image` and `label` columns, or `one_hot` with a column per
                class; `where: {column: value}` keeps rows; `folder` holds the images, also in
                folders of its own; each class has `labels`.
  `file_names`  `images` is a glob, `pattern` a regular expression with a group `label`.
  `hdf5`        `images` and `labels`: `{file, dataset}`, as PatchCamelyon is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pathcore.files import StrPath
from pathcore.images import image_files, load_image, path_inside

_PACKAGE = "pathgen.clip.benchmarks"
_KINDS = {
    "folders": set(),
    "table": {"file", "image"},
    "file_names": {"images", "pattern"},
    "hdf5": {"images", "labels"},
}


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    id: str
    path: Path

    def open(self) -> Any:
        """Returns it in RGB."""
        return load_image(self.path)


@dataclass(frozen=True)
class HDF5Image:
    """A row of a dataset `(N, height, width, 3)` of an HDF5 file."""

    id: str
    path: Path
    dataset: str
    row: int

    def open(self) -> Any:
        """Returns it in RGB; the file is opened anew, so that processes do not share it."""
        import h5py
        from PIL import Image

        with h5py.File(self.path, "r") as file:
            return Image.fromarray(file[self.dataset][self.row]).convert("RGB")


@dataclass(frozen=True)
class LabelledImages:
    """A data set as it lies on disk.

    Attributes:
        images: In a fixed order.
        labels: The class of each, counted from 0.
        skipped: `id` and `reason` of rows that cannot be used.
    """

    images: tuple[FileImage | HDF5Image, ...]
    labels: tuple[int, ...]
    skipped: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class ClassBenchmark:
    """A zero-shot classification benchmark.

    Attributes:
        name: As it appears in reports.
        classes: Names in order.
        prompts: For each class, wordings that stand for it.
        templates: Sentences with `{}` for a wording.
        layout: How the data lies on disk.
        keys: For each class, its folders or labels.
    """

    name: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    layout: Mapping[str, Any]
    keys: tuple[tuple[str, ...], ...]

    def sentences(self, index: int) -> list[str]:
        """Every template with every wording of a class."""
        return [t.replace("{}", p) for t in self.templates for p in self.prompts[index]]


def benchmark_names() -> list[str]:
    """The configs that come with the package."""
    files = resources.files(_PACKAGE).iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".json"))


def load_benchmark(name_or_file: StrPath) -> ClassBenchmark:
    """Reads a config by file, or by name one of those that come with the package.

    Raises:
        FileNotFoundError: Neither a file nor a known name.
        ValueError: Not such a config; names the field.
    """
    path = Path(name_or_file)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(name_or_file) in benchmark_names():
        text = (resources.files(_PACKAGE) / f"{name_or_file}.json").read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(
            f"benchmark {name_or_file}: neither a file nor one of {', '.join(benchmark_names())}"
        )
    try:
        return _benchmark(_parse(text, path.suffix))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"benchmark {name_or_file}: {type(error).__name__}: {error}") from error


def read_images(benchmark: ClassBenchmark, data_path: StrPath) -> LabelledImages:
    """Finds the images of a data set and their classes.

    Raises:
        FileNotFoundError: No such folder or table, or no images of a class.
        ValueError: A layout that does not fit what lies there.
    """
    folder = Path(data_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of {benchmark.name}")
    readers = {"folders": _folders, "table": _table, "file_names": _file_names, "hdf5": _hdf5}
    found = readers[benchmark.layout["kind"]](benchmark, folder)
    missing = [n for i, n in enumerate(benchmark.classes) if i not in set(found.labels)]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no images of {', '.join(missing)} of {benchmark.name}, laid out as "
            f"{json.dumps(dict(benchmark.layout))}; copy the config and adapt it"
            + (f"; the first skipped row: {found.skipped[0]}" if found.skipped else "")
        )
    return found


def _folders(benchmark: ClassBenchmark, folder: Path) -> LabelledImages:
    images, labels = [], []
    for index, patterns in enumerate(benchmark.keys):
        paths: set[Path] = set()
        for pattern in patterns:
            for match in folder.glob(pattern):
                if not match.name.startswith("."):
                    paths.update(image_files(match) if match.is_dir() else [match])
        for path in sorted(paths):
            images.append(FileImage(path.relative_to(folder).as_posix(), path))
            labels.append(index)
    return LabelledImages(tuple(images), tuple(labels))


def _table(benchmark: ClassBenchmark, folder: Path) -> LabelledImages:
    layout = benchmark.layout
    table = folder / layout["file"]
    root = folder / layout.get("folder", "")
    by_label = {label.lower(): i for i, labels in enumerate(benchmark.keys) for label in labels}
    by_name: dict[str, Path] = {}
    images, labels, skipped = [], [], []
    for row in _rows(table):
        needed = [layout["image"], *layout.get("where", {}), *_label_columns(benchmark)]
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{table}: no columns {absent}, only {sorted(row)}")
        if any(row[column] != str(value) for column, value in layout.get("where", {}).items()):
            continue
        name = row[layout["image"]]
        if "one_hot" in layout:
            ones = [i for i, keys in enumerate(benchmark.keys) if _is_one(row, keys)]
        else:
            ones = [by_label[v] for v in [row[layout["label"]].lower()] if v in by_label]
            if not ones and row[layout["label"]].lower() in map(str.lower, layout.get("drop", ())):
                continue
        if len(ones) != 1:
            skipped.append({"id": name, "reason": f"belongs to {len(ones)} classes"})
            continue
        try:
            path = path_inside(root, name)
            if not path.is_file():
                by_name = by_name or {_plain(p.stem): p for p in image_files(root)}
                path = by_name[_plain(re.sub(r"\.(jpe?g|png|tiff?)$", "", Path(name).name))]
        except (ValueError, KeyError) as error:
            skipped.append({"id": name, "reason": f"no such image in {root}: {error}"})
            continue
        images.append(FileImage(name, path))
        labels.append(ones[0])
    return LabelledImages(tuple(images), tuple(labels), tuple(skipped))


def _file_names(benchmark: ClassBenchmark, folder: Path) -> LabelledImages:
    pattern = re.compile(benchmark.layout["pattern"])
    by_label = {label: i for i, labels in enumerate(benchmark.keys) for label in labels}
    drop = set(map(str, benchmark.layout.get("drop", ())))
    images, labels, skipped = [], [], []
    for path in sorted(folder.glob(benchmark.layout["images"])):
        name = path.relative_to(folder).as_posix()
        match = pattern.search(path.name)
        label = re.sub(r"\W+", "_", match["label"]).strip("_") if match else None
        if label in by_label:
            images.append(FileImage(name, path))
            labels.append(by_label[label])
        elif label not in drop:
            skipped.append({"id": name, "reason": f"label {label!r} is of no class"})
    return LabelledImages(tuple(images), tuple(labels), tuple(skipped))


def _hdf5(benchmark: ClassBenchmark, folder: Path) -> LabelledImages:
    import h5py

    sizes = []
    for part in ("images", "labels"):
        file = folder / benchmark.layout[part]["file"]
        if not file.is_file():
            packed = file.with_name(f"{file.name}.gz")
            hint = "; unpack it: gunzip" if packed.is_file() else ""
            raise FileNotFoundError(f"{file}: no such file{hint}")
        with h5py.File(file, "r") as content:
            name = benchmark.layout[part]["dataset"]
            if name not in content:
                raise ValueError(f"{file}: no dataset {name!r}, only {sorted(content)}")
            sizes.append(len(content[name]))
            values = content[name][:].reshape(-1).tolist() if part == "labels" else []
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder}: {sizes[0]} images, {sizes[1]} labels")
    path = folder / benchmark.layout["images"]["file"]
    name = benchmark.layout["images"]["dataset"]
    by_label = {label: i for i, labels in enumerate(benchmark.keys) for label in labels}
    if unknown := {str(value) for value in values} - set(by_label):
        raise ValueError(f"{folder}: labels {sorted(unknown)} are of no class")
    images = tuple(HDF5Image(f"{path.name}:{row}", path, name, row) for row in range(sizes[0]))
    return LabelledImages(images, tuple(by_label[str(value)] for value in values))


def _rows(table: Path) -> Iterator[dict[str, str]]:
    import pandas as pd

    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such table")
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    read = pd.read_excel if table.suffix == ".xlsx" else pd.read_csv
    try:
        frame = read(table, **options)
    except (ValueError, OSError) as error:
        raise ValueError(f"{table}: cannot be read: {error}") from error
    for row in frame.to_dict("records"):
        yield {str(column).strip(): str(value).strip() for column, value in row.items()}


def _label_columns(benchmark: ClassBenchmark) -> list[str]:
    if "one_hot" in benchmark.layout:
        return [keys[0] for keys in benchmark.keys]
    return [benchmark.layout["label"]]


def _is_one(row: Mapping[str, str], keys: tuple[str, ...]) -> bool:
    return any(row.get(key, "") in ("1", "1.0") for key in keys)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _parse(text: str, suffix: str) -> Any:
    if suffix in (".yml", ".yaml"):
        import yaml

        return yaml.safe_load(text)
    return json.loads(text)


def _benchmark(content: Mapping[str, Any]) -> ClassBenchmark:
    layout = dict(content.get("layout", {"kind": "folders"}))
    kind = layout.get("kind")
    if kind not in _KINDS or (lacking := _KINDS[kind] - set(layout)):
        lacks = f"; it lacks {sorted(lacking)}" if kind in _KINDS else ""
        raise ValueError(f"layout of kind {kind!r}: one of {sorted(_KINDS)} expected{lacks}")
    if kind == "table" and not {"label", "one_hot"} & set(layout):
        raise ValueError("layout of kind 'table': label or one_hot expected")
    templates = tuple(map(str, content["templates"]))
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError("templates: sentences with one {} each expected")
    rows = content["classes"]
    names = tuple(str(row["name"]) for row in rows)
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"classes: two at least, of different names, expected; got {names}")
    field = "folders" if kind == "folders" else "labels"
    return ClassBenchmark(
        name=str(content["name"]),
        classes=names,
        prompts=tuple(tuple(map(str, row["prompts"])) for row in rows),
        templates=templates,
        layout=layout,
        keys=tuple(tuple(map(str, row.get(field, [row["name"]]))) for row in rows),
    )

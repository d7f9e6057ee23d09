"""Joins converted sets with separate image folders, for recipes that train on several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pallava.converters.conversion import REPORT_NAME, Conversion, Record, Row
from pallava.records.containers import read_json_rows
from pallava.records.questions import as_mapping
from pallava.text.encoding import image_files
from pathcore.files import StrPath
from pathcore.images import path_inside, relative_name

_KINDS: tuple[Literal["pairs", "conversations"], ...] = ("conversations", "pairs")
_FIELDS: tuple[Literal["image", "slide"], ...] = ("image", "slide")


def join_sets(sets: Sequence[StrPath], image_root: StrPath | None = None) -> Conversion:
    """Joins sets of pairs or of conversations; image names become relative to one common folder.

    Args:
        sets: Folders that `convert-dataset` wrote, or `ROWS=IMAGES` for a file of rows and the
            folder that its image names are relative to.
        image_root: Folder that contains all image folders. Defaults to the deepest one.

    Returns:
        The joined set, to be written by `pallava.converters.conversion.convert`. An id that an
        earlier row has gets the number of its set as a prefix, such as `1:train-0`.

    Raises:
        FileNotFoundError: If a folder has no rows or does not record its image folder.
        ValueError: If the sets are of different kinds, some are about images and some about slides,
            or they have no folder in common.
    """
    found = [_find(str(name)) for name in sets]
    kinds = {rows.stem for rows, _ in found}
    kind = next((name for name in _KINDS if kinds == {name}), None)
    if kind is None:
        raise ValueError(
            f"expected sets that are all pairs.jsonl or all conversations.jsonl, found "
            f"{', '.join(sorted(kinds))}"
        )
    field = _image_field([rows for rows, _ in found])
    folders = [images.resolve() for _, images in found]
    root = Path(image_root).resolve() if image_root else Path(os.path.commonpath(folders))
    if root == Path(root.anchor):
        raise ValueError(
            "the image folders have only the root of the file system in common; move them below "
            "one folder, or name it by --image-root"
        )
    if outside := [str(folder) for folder in folders if not folder.is_relative_to(root)]:
        raise ValueError(f"image folder {outside[0]}: not inside {root}")

    def records() -> Iterator[Record]:
        earlier: set[str] = set()  # ids in the sets before; shards converted apart repeat them
        for number, (rows, _) in enumerate(found):
            ids = set()
            for where, row in read_json_rows(rows):
                if isinstance(row, Mapping) and "id" in row:
                    ids.add(name := str(row["id"]))
                    if name in earlier:
                        row = {**row, "id": f"{number}:{name}"}
                yield f"{number}:{where}", row
            earlier |= ids

    def make(where: str, record: Any) -> list[Row]:
        row = dict(as_mapping(record))
        folder = folders[int(where.split(":")[0])]
        names = [
            relative_name(root, path_inside(folder, name.removesuffix(suffix)))
            for name in image_files(row, field)
        ]
        if names:
            row[field] = names[0] if isinstance(row[field], str) else names
        return [row]

    suffix = ".h5" if field == "slide" else ""
    inputs = {"sets": [[str(rows), str(images)] for rows, images in found]}
    files = [rows for rows, _ in found]
    return Conversion(kind, "joined", "", records(), make, root, files, inputs, field)


def _image_field(files: Sequence[Path]) -> Literal["image", "slide"]:
    """Returns the field in which the rows of all files name their images.

    Raises:
        ValueError: If some have images and some slides.
    """
    fields: dict[Path, Literal["image", "slide"]] = {}
    for path in files:
        for _, row in read_json_rows(path):
            values = row if isinstance(row, Mapping) else {}
            named = [
                name
                for name in _FIELDS
                if values.get(name) and isinstance(values[name], str | list)
            ]
            if named:
                fields[path] = named[0]
                break
    if len(set(fields.values())) > 1:
        found = ", ".join(f"{path}: {name}" for path, name in fields.items())
        raise ValueError(
            f"expected sets that are all about images or all about slides, found {found}"
        )
    return "slide" if "slide" in fields.values() else "image"


def _find(text: str) -> tuple[Path, Path]:
    """Returns the rows and the image folder of a set."""
    rows, equals, images = text.partition("=")
    if equals:
        for path in (Path(rows), Path(images)):
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or folder")
        return Path(rows), Path(images)
    folder = Path(text)
    report = folder / REPORT_NAME
    if not report.is_file():
        raise FileNotFoundError(
            f"{folder}: no {REPORT_NAME} in it, which names its image folder; expected a folder "
            "that convert-dataset wrote, or ROWS=IMAGE_FOLDER"
        )
    written = json.loads(report.read_bytes())
    return folder / f"{written['kind']}.jsonl", Path(written["image_folder"])

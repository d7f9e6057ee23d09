"""Writes classification datasets as one folder per class, as `evaluate zero-shot` reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pallava.folder_build import FolderBuild
from pallava.records.class_folders import read_class_folders
from pallava.records.questions import FileImage
from pallava.skipping import SKIP_LOG_NAME, SkipLog, SkippedSample
from pathcore.files import StrPath, file_identity
from pathcore.image_sets import ImageSet

CONFIG_NAME = "classes.json"
REPORT_NAME = "conversion.json"

Link = Literal["hard", "symbolic", "copy"]


@dataclass(frozen=True)
class ClassConversion:
    """A classification dataset to be written as class folders.

    Attributes:
        source: Name of the dataset.
        licence: Licence of the dataset.
        class_set: Question, classes and wordings, which are copied to the written config.
        images: Pairs of image file and class, in order.
        skipped: Rows and images that cannot be used.
    """

    source: str
    licence: str
    class_set: ImageSet
    images: Sequence[tuple[Path, str]]
    skipped: Sequence[SkippedSample]


def class_conversion(
    source: str,
    licence: str,
    class_set: ImageSet,
    data_path: StrPath,
) -> ClassConversion:
    """Finds the images of every class.

    Args:
        source: Name of the dataset.
        licence: Licence of the dataset.
        class_set: Question, classes, and globs of their images below `data_path`.
        data_path: Folder of the unpacked dataset.

    Raises:
        FileNotFoundError: If the folder does not exist, or a class has no images.
        ValueError: If more than a tenth of a table's rows cannot be used.
    """
    found = read_class_folders(data_path, class_set)
    images = [
        (question.image.path, str(question.answer))
        for question in found.questions
        if isinstance(question.image, FileImage)
    ]
    return ClassConversion(source, licence, class_set, images, found.skipped)


def write_class_folders(
    conversion: ClassConversion,
    out: StrPath,
    *,
    link: Link = "hard",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `OUT/CLASS/FILE` and `classes.json`; resumes after an interruption.

    Args:
        conversion: Result of a converter.
        out: Output folder, which appears only when it is complete.
        link: How files are placed. `hard` takes no disk space and falls back to copying across file
            systems.
        progress: Called with the number of images processed.

    Returns:
        The report: `num_rows`, `num_skipped`, `num_by_class`.

    Raises:
        OutputExistsError: If `out` holds something else.
    """
    folders = {name: folder_name(name) for name in conversion.class_set.names}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"class names {', '.join(folders)}: they give the same folder names")
    places = _places(conversion, folders)
    inputs = {"source": conversion.source, "link": link, "files": [
        [place, *file_identity(path)] for place, path in places.items()]}  # fmt: skip
    by_class = dict.fromkeys(folders, 0)
    for _, name in conversion.images:
        by_class[name] += 1
    report = {
        "kind": "classes",
        "source": conversion.source,
        "licence": conversion.licence,
        "num_rows": len(places),
        "num_skipped": len(conversion.skipped),
        "num_by_class": by_class,
    }
    with FolderBuild(out, inputs) as build:
        if not build.complete:
            for place, path in places.items():
                if not build.has(place):
                    with build.file(place) as partial:
                        _link(path, partial, link)
                progress(1)
            _write_texts(build, conversion, folders, report)
        build.finish()
    return report


def folder_name(name: str) -> str:
    """Converts a class name to a folder name of letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_") or "class"


def _places(conversion: ClassConversion, folders: dict[str, str]) -> dict[str, Path]:
    """Assigns output paths; duplicate names within a class are prefixed with the parent folder."""
    places: dict[str, Path] = {}
    for path, name in conversion.images:
        place, parent = f"{folders[name]}/{path.name}", path.parent
        while place in places and places[place] != path:
            prefix = folder_name(parent.name)
            place = f"{folders[name]}/{prefix}__{place.partition('/')[2]}"
            parent = parent.parent
        places[place] = path
    return places


def _link(path: Path, target: Path, link: Link) -> None:
    target.unlink(missing_ok=True)
    if link == "symbolic":
        target.symlink_to(path.resolve())
    elif link == "hard":
        try:
            os.link(path.resolve(), target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, target)
    else:
        shutil.copyfile(path, target)


def _write_texts(
    build: FolderBuild, conversion: ClassConversion, folders: dict[str, str], report: dict[str, Any]
) -> None:
    config = {
        "name": conversion.class_set.name,
        "question": conversion.class_set.question,
        "classes": [
            {"name": item.name, "folders": [folders[item.name]], "wordings": list(item.wordings)}
            for item in conversion.class_set.classes
        ],
    }
    for name, content in ((CONFIG_NAME, config), (REPORT_NAME, report)):
        with build.file(name) as partial:
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            partial.write_text(text, encoding="utf-8")
    with build.file(SKIP_LOG_NAME) as partial:
        partial.write_text("", encoding="utf-8")
        log = SkipLog(partial)
        for sample in conversion.skipped:
            log.record(sample.id, sample.file, sample.reason)

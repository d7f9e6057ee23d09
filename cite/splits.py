"""Splits patches by slide into training and validation, as published for PatchGastric.

The published rule (Zhang et al. 2023, https://github.com/Yunkun-Zhang/CITE, `tools/ann.py`): in
each class a fraction of the slides is drawn for validation; training uses the k remaining slides
with the most patches.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathcore.files import StrPath, write_text
from pathcore.rows import read_csv

PUBLISHED_SUBTYPES = {
    "Well differentiated tubular adenocarcinoma": 0,
    "Moderately differentiated tubular adenocarcinoma": 1,
    "Poorly differentiated adenocarcinoma, non-solid type": 2,
    "Poorly differentiated adenocarcinoma, solid type": 2,
}
"""Class of each subtype in captions.csv; other subtypes are not used."""

PUBLISHED_NUM_SLIDES = (1, 2, 4, 8, 16)
PUBLISHED_VAL = 0.8

Patch = tuple[str, int]
"""File name and label, a line of an annotation file."""


@dataclass
class Split:
    """Patches for training and validation, and what was skipped.

    Attributes:
        train: Patches of all slides that are not used for validation.
        val: Patches for validation, sorted by class.
        num_slides: Number of slides per class, including those without patches.
        without_slide_id: Names without a slide id.
        no_images: Names without the suffix of an image, such as unfinished downloads.
        unknown: Number of patches for each slide id that has no class.
        without_patches: Slides without patches.
    """

    train: list[Patch]
    val: list[Patch]
    num_slides: list[int]
    without_slide_id: list[str] = field(default_factory=list)
    no_images: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    without_patches: list[str] = field(default_factory=list)

    def count(self, part: Sequence[Patch]) -> list[int]:
        """Returns the number of patches by class."""
        return [sum(label == c for _, label in part) for c in range(len(self.num_slides))]


def slide_id(name: str) -> str:
    """Returns the slide of a patch, which is its file name up to the first `_`.

    Raises:
        ValueError: If the name has no `_`, or starts with it.

    Example:
        >>> slide_id("fold/1e2571e554bc5b3e_12.jpg")
        '1e2571e554bc5b3e'
    """
    slide, separator, _ = name.rsplit("/", 1)[-1].partition("_")
    if not slide or not separator:
        raise ValueError(
            f"patch name {name!r} holds no slide id; expected <slide>_<anything>, such as A01_7.jpg"
        )
    return slide


def read_captions(
    path: StrPath, subtypes: Mapping[str, int] = PUBLISHED_SUBTYPES
) -> dict[str, int]:
    """Reads the class of each slide from captions.csv (columns `id` and `subtype`), in file order.

    Args:
        path: The file; further columns are ignored.
        subtypes: Class of each subtype, counted from 0; rows of other subtypes are ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is not UTF-8, a column is missing, a slide occurs twice, or a class
            has no slide.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; put captions.csv of PatchGastric there, or name it"
        )
    labels: dict[str, int] = {}
    for line, row in read_csv(path, columns=("id", "subtype")):
        slide, subtype = (row["id"] or "").strip(), (row["subtype"] or "").strip()
        if subtype not in subtypes:
            continue
        if slide in labels:
            raise ValueError(f"{path}:{line}: slide {slide!r} is named a second time")
        labels[slide] = subtypes[subtype]
    for label in range(max(subtypes.values()) + 1):
        if label not in labels.values():
            names = " or ".join(repr(name) for name, c in subtypes.items() if c == label)
            raise ValueError(f"{path}: class {label} has no slide: no row of subtype {names}")
    return labels


def split_slides(
    labels: Mapping[str, int],
    listing: Iterable[str],
    *,
    val: float = PUBLISHED_VAL,
    seed: int = 0,
) -> Split:
    """Divides the listed patches by slide into training and validation.

    Args:
        labels: Class of each slide. Its order matters, since validation slides are drawn from it.
        listing: Names of patches. Its order breaks ties between slides with equally many patches.
        val: Fraction of the slides of each class for validation.
        seed: Seed of the draw.

    Raises:
        ValueError: If `val` is not between 0 and 1, a name contains a line break, or a class has no
            slide with patches for training or validation.
    """
    from pathcore.images import IMAGE_SUFFIXES  # Pillow would slow down the help of every command

    if not 0 < val < 1:
        raise ValueError(f"val: expected a fraction such as {PUBLISHED_VAL}, found {val}")
    slides: list[list[str]] = [[] for _ in range(max(labels.values()) + 1)]
    for slide, label in labels.items():
        slides[label].append(slide)
    generator = random.Random(seed)
    # int() rounds down, as in the published code.
    validating = {slide for ids in slides for slide in generator.sample(ids, int(len(ids) * val))}
    result = Split([], [], [len(ids) for ids in slides])
    seen = set()
    for name in listing:
        if "\n" in name or "\r" in name:
            raise ValueError(f"patch name {name!r} holds a line break; rename the file")
        if not name.lower().endswith(IMAGE_SUFFIXES):
            result.no_images.append(name)
            continue
        try:
            slide = slide_id(name)
        except ValueError:
            result.without_slide_id.append(name)
            continue
        if slide not in labels:
            result.unknown[slide] = result.unknown.get(slide, 0) + 1
            continue
        seen.add(slide)
        (result.val if slide in validating else result.train).append((name, labels[slide]))
    result.val.sort(key=lambda patch: patch[1])
    result.without_patches = [slide for slide in labels if slide not in seen]
    for side, part in (("training", result.train), ("validation", result.val)):
        for label, count in enumerate(result.count(part)):
            if not count:
                raise ValueError(
                    f"class {label} has no slide with patches for {side}: {len(slides[label])} "
                    f"slides in captions.csv, {int(len(slides[label]) * val)} of them for "
                    f"validation{_compare_ids(result, labels)}; check the folder of patches, or "
                    "choose another fraction"
                )
    return result


def _compare_ids(split: Split, labels: Mapping[str, int]) -> str:
    """Returns examples of ids and names if no patch belongs to a slide, since formats differ."""
    if len(split.without_patches) < len(labels):
        return ""
    names = [*split.unknown, *split.without_slide_id, *split.no_images]
    found = f"patch names such as {names[0]!r}" if names else "no patches at all"
    return f". No patch belongs to a slide: ids such as {next(iter(labels))!r}, {found}"


def choose_slides(
    train: Sequence[Patch], num_slides: int, *, seed: int = 0, most_patches: bool = True
) -> list[Patch]:
    """Chooses a few slides of each class and returns their patches, shuffled.

    Args:
        train: The patches to choose from.
        num_slides: Number of slides per class; all slides of classes that have fewer.
        seed: Seed of the order, and of the draw without `most_patches`.
        most_patches: Whether to choose the slides with the most patches, of which the first wins a
            tie. Otherwise `num_slides` patches are drawn at random and their slides are chosen,
            which may be fewer.

    Raises:
        ValueError: If `num_slides` is below 1, or exceeds the number of patches to draw from.
    """
    if num_slides < 1:
        raise ValueError(f"num_slides is {num_slides}; expected 1 or more")
    generator = random.Random(seed)
    by_class: dict[int, list[str]] = {}
    for name, label in train:
        by_class.setdefault(label, []).append(name)
    chosen: list[Patch] = []
    for label in sorted(by_class):
        names = by_class[label]
        if most_patches:
            counts: dict[str, int] = {}
            for name in names:
                counts[slide_id(name)] = counts.get(slide_id(name), 0) + 1
            slides = set(sorted(counts, key=lambda slide: -counts[slide])[:num_slides])
        elif num_slides > len(names):
            raise ValueError(
                f"class {label} has {len(names)} patches; {num_slides} are to be drawn"
            )
        else:
            slides = {slide_id(name) for name in generator.sample(names, num_slides)}
        chosen += [(name, label) for name in names if slide_id(name) in slides]
    generator.shuffle(chosen)
    return chosen


def draw_slides(train: Sequence[Patch], num_slides: int, *, seed: int = 0) -> list[Patch]:
    """Draws slides of each class at random and returns their patches in the given order.

    For the same seed, the slides for a smaller number are a subset of those for a larger one.

    Args:
        train: The patches to choose from.
        num_slides: Number of slides per class.
        seed: Seed of the draw.

    Raises:
        ValueError: If `num_slides` is below 1, or a class has fewer slides.
    """
    if num_slides < 1:
        raise ValueError(f"num_slides is {num_slides}; expected 1 or more")
    generator = random.Random(seed)
    slides: dict[int, dict[str, None]] = {}
    for name, label in train:
        slides.setdefault(label, {})[slide_id(name)] = None
    chosen: set[str] = set()
    for label in sorted(slides):
        ids = sorted(slides[label])
        if num_slides > len(ids):
            raise ValueError(f"class {label} has {len(ids)} slides; {num_slides} are to be drawn")
        generator.shuffle(ids)
        chosen.update(ids[:num_slides])
    return [patch for patch in train if slide_id(patch[0]) in chosen]


def published_names(val: float, num_slides: int | str | None = None, suffix: str = "") -> str:
    """Returns the published name of an annotation file.

    Example:
        >>> published_names(0.8), published_names(0.8, 16)
        ('val_0.8.txt', 'train_16_0.2.txt')
    """
    if num_slides is None:
        return f"val_{val}{suffix}.txt"
    return f"train_{num_slides}_{round(1 - val, 2)}{suffix}.txt"


def read_patches(path: StrPath) -> Iterator[tuple[int, Patch]]:
    """Yields `(line number, (name, label))` of an annotation file with lines `name label`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is not UTF-8 or invalid. The message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such annotation file; for PatchGastric `python tools/ann.py` makes it"
        )
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                # Excel and Notepad write a byte order mark at the start of UTF-8 files.
                line = raw.decode().lstrip("\ufeff").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text") from error
            name, _, label = line.rpartition(" ")
            if line and not (name and re.fullmatch(r"\d+", label)):
                raise ValueError(f"{path}:{number}: {line!r} found; expected `filename label`")
            if line:
                yield number, (name.strip(), int(label))


def write_patches(path: StrPath, patches: Sequence[Patch], *, final_newline: bool = True) -> None:
    """Writes an annotation file with a line `name label` per patch, atomically.

    Args:
        path: The file.
        patches: Names and labels.
        final_newline: Whether the last line ends with a newline; in the published files with few
            slides it does not.
    """
    text = "\n".join(f"{name} {label}" for name, label in patches)
    write_text(path, text + "\n" if final_newline else text)

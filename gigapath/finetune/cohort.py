"""The slides of a fine-tuning: labels, splits, and what is wrong with which file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.embed.slide_vectors import NUM_GRIDS
from gigapath.finetune.bags import CELL_PX, SlideFolder, SlideScan
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.splits import (
    PARTS,
    Split,
    check_parts,
    make_splits,
    read_splits,
    write_splits,
)
from gigapath.finetune.tasks import LabelledSlides, SlideTask, read_labels
from gigapath.slide_encoder import ARCHITECTURES


@dataclass(frozen=True)
class Cohort:
    """The slides of a run.

    Attributes:
        labels: Slide -> label.
        splits: Fold -> slides that can be used.
        num_tiles: Slide -> number of tiles.
        skipped: `id`, `reason` of rows and slides that are left out.
        num_without_row: Files of features that the table does not name.
    """

    labels: Mapping[str, Any]
    splits: Mapping[int, Split]
    num_tiles: Mapping[str, int]
    skipped: tuple[dict[str, str], ...]
    num_without_row: int


def read_cohort(
    folder: SlideFolder,
    table: str | os.PathLike[str],
    task: SlideTask,
    out: Path,
    splits: str | os.PathLike[str] | None,
    settings: FinetuneSettings,
    progress: bool,
) -> Cohort:
    """Reads tables and looks at every slide.

    Args:
        folder: Tile embeddings.
        table: csv with `slide_id`, labels and, where patients are known, `pat_id`.
        task: What is predicted.
        out: Takes the splits that can be used, and what was found about each slide.
        splits: Folder of tables, or None to make them.
        settings: Of the training.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: Tables that are not there.
        ValueError: Tables that contradict themselves, or a fold without usable slides.
    """
    labelled = read_labels(table, task)
    made, unknown = _splits(labelled, splits, settings)
    slides = sorted(
        {slide for split in made.values() for p in PARTS for slide in getattr(split, p)}
    )
    grid = _grid(settings) if folder.cell_px is not None else None
    num_tiles, bad = SlideScan(folder, slides, settings.input_dim, grid).run(
        out / "slides.json", num_workers=settings.num_workers, progress=progress
    )
    if not num_tiles:
        raise ValueError(f"features {folder.path}: no slide can be used: {bad[0]['reason']}")
    usable = {fold: split.only(num_tiles) for fold, split in made.items()}
    for fold, split in usable.items():
        check_parts(split, fold, with_val=settings.needs_val)
    write_splits(out / "splits", usable)
    rows = {row["id"]: row for row in (*labelled.skipped, *unknown, *bad)}
    named = {slide.removesuffix(".svs") for slide in (*labelled.labels, *rows)}
    labels = {slide: labelled.labels[slide] for slide in num_tiles}
    return Cohort(
        labels, usable, num_tiles, tuple(rows.values()), len(set(folder.slides()) - named)
    )


def slide_folder(
    path: str | os.PathLike[str], settings: FinetuneSettings, *, with_places: bool
) -> SlideFolder:
    """The tile embeddings as a training reads them; `with_places` if tiles have to lie on a grid.

    Raises:
        FileNotFoundError: No such folder.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"features {path}: no such folder")
    options = {**ARCHITECTURES.get(settings.model_arch, {}), **settings.encoder}
    checked = with_places and options.get("out_of_grid") != "original"
    return SlideFolder(Path(path), with_places, settings.tile_size if checked else None)


def _grid(settings: FinetuneSettings) -> tuple[int, int]:
    """Side and number of the encoder's cells."""
    options = {**ARCHITECTURES[settings.model_arch], **settings.encoder}
    return settings.tile_size or CELL_PX, int(options.get("slide_ngrids", NUM_GRIDS))


def _splits(
    labelled: LabelledSlides,
    splits: str | os.PathLike[str] | None,
    settings: FinetuneSettings,
) -> tuple[dict[int, Split], list[dict[str, str]]]:
    if splits is not None:
        return read_splits(splits, labelled, folds=settings.folds, split_key=settings.split_key)
    made = make_splits(
        labelled,
        method=settings.split_method,
        folds=settings.folds,
        val_r=settings.val_r,
        test_r=settings.test_r,
        split_key=settings.split_key,
        seed=settings.seed,
    )
    return made, []
